// What an emulated kernel calls. cuda/gpu/emulated*.h give these functions CUDA's names and those
// of the gpu layer; hooks.cc calls access() for the plain loads and stores of checked kernels.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace tilewright::emulator {

// Where an operation was written. With a line, `where` is the file's name; without one, it is the
// address after the call (plain loads and stores), which debug information turns into a line.
struct Site {
  const void* where = nullptr;
  int line = 0;
};

// The calling thread's place in the launch. It never changes within a kernel: hence const.
[[gnu::const]] uint3 thread_index() noexcept;
[[gnu::const]] uint3 block_index() noexcept;
[[gnu::const]] dim3 block_extent() noexcept;
[[gnu::const]] dim3 grid_extent() noexcept;

// The block's dynamic shared memory, of which the kernel uses the first `bytes`.
void* shared_memory(std::size_t bytes, Site site);

enum class Access : std::uint8_t { read, write, atomic, async_issue, async_done };
// Checks that the calling thread may touch these bytes, and remembers that it did.
void access(const void* address, std::size_t bytes, Access kind, Site site);

void load_vector(void* to, const void* from, std::size_t bytes, Site site);
void store_vector(void* to, const void* from, std::size_t bytes, Site site);

// Barriers of the block: the number of threads that came with a predicate that is not zero.
int barrier(int predicate, Site site);

// Operations of the lanes in `mask`, which all must come.
void warp_barrier(unsigned mask, Site site);
unsigned ballot(unsigned mask, int predicate, Site site);
enum class Shuffle : std::uint8_t { index, up, down, exclusive_or };
std::uint64_t shuffle(unsigned mask, std::uint64_t value, Shuffle kind, int operand, int width,
                      Site site);

// `count` 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
void ldmatrix(std::uint32_t* registers, int count, bool transpose, const void* row, Site site);

// d += a b on one 16 x 8 tile; a has 4 registers a lane, b has 2, d has 4.
enum class Mma : std::uint8_t {
  bf16_m16n8k16,
  f16_m16n8k16,
  tf32_m16n8k8,
  s8_s8_m16n8k32,  // a's integers, then b's
  s8_u8_m16n8k32,
  u8_s8_m16n8k32,
  u8_u8_m16n8k32,
};
void mma(Mma kind, void* d, const std::uint32_t* a, const std::uint32_t* b, Site site);

// Copies happen when the issuing thread waits for them, the latest moment that hardware allows;
// until then the destination holds NaN.
void cp_async(void* shared, const void* global, int bytes, int source_bytes, Site site);
void cp_async_commit();
void cp_async_wait(int groups_left);

}  // namespace tilewright::emulator

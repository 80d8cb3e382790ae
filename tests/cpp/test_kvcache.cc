// Attention over pages that end at guard pages, with NaN where no token is; and the cache's pages as
// they come, are shared, and go. What the values are, the Python tests check.
#include <cmath>
#include <memory>
#include <vector>

#include "core/check.h"
#include "cpu/kvcache.h"
#include "guarded.h"
#include "test.h"
#include "tilewright/ops.h"

using namespace tilewright;
using test::Guarded;
using test::Operand;

namespace {

constexpr int64_t kHeads = 2;

// Pages of a sequence whose K, V, scales of K or scales of V (`last`: 0 to 3) end at a guard.
struct Pages {
  Pages(DType dtype, int64_t tokens, int64_t dims, int64_t length, int last) {
    const int64_t rows = kHeads * tokens, data = rows * dims * dtype_size(dtype);
    const int64_t bytes[4] = {data, data, rows * 4, rows * 4};
    int64_t offset[4], end = 0;
    for (int i = 1; i <= 4; ++i) {
      const int piece = (last + i) % 4;
      while ((end + (i == 4 ? bytes[piece] : 0)) % 4 != 0) ++end;
      offset[piece] = end;
      end += bytes[piece];
    }
    // What comes before K can't be described: a page begins with it.
    const int64_t base = offset[0];
    layout = {nullptr, 0,     tokens,           kHeads,
              dims,    dtype, offset[1] - base, {offset[2] - base, offset[3] - base}};
    for (int64_t first = 0; first < length; first += tokens) {
      memory.push_back(std::make_unique<Guarded>(end));
      char* page = memory.back()->as<char>() + base;
      pointers.push_back(page);
      for (int64_t row = 0; row < rows; ++row) {
        const bool there = first + row % tokens < length;
        for (const bool v : {false, true}) {
          for (int64_t d = 0; d < dims; ++d) {
            const float value = there || dtype == DType::s8 ? float(test::small(row + d, v)) : NAN;
            test::set_element(page + (v ? layout.value : 0), row * dims + d, dtype, value);
          }
          reinterpret_cast<float*>(page + layout.scale[v])[row] = there ? 0.5f : NAN;
        }
      }
    }
    layout.pages = pointers.data();
    layout.stride = int64_t(pointers.size());
  }
  Pages(const Pages&) = delete;
  PagedKeys layout;

 private:
  std::vector<std::unique_ptr<Guarded>> memory;
  std::vector<const char*> pointers;
};

void attend(DType dtype, int64_t tokens, int64_t dims, int64_t rows, int64_t length, int last,
            const KernelTable& table) {
  const Pages pages(dtype, tokens, dims, length, last);
  const Operand q(DType::f32, {1, 2 * kHeads, rows, dims}), lengths(DType::s64, {1});
  const Operand out(DType::f32, {1, 2 * kHeads, rows, dims});
  *lengths.view.ptr<int64_t>() = length;
  AttentionProblem p{};
  p.batch = 1, p.heads = 2 * kHeads, p.heads_kv = kHeads;
  p.seqlen_q = rows, p.seqlen_k = length, p.head_dim = p.head_dim_v = dims;
  p.q = q.view, p.paged = &pages.layout, p.kv_lengths = lengths.view;
  p.left = -1, p.right = 0, p.scale = 0.25f;
  attention_forward(p, {out.view, {}}, table);
  bool finite = true;
  for (int64_t i = 0; i < out.view.size(); ++i) {
    finite = finite && std::isfinite(out.view.ptr<float>()[i]);
  }
  CHECK(finite);
}

void append(KVCache& cache, int64_t layer, int64_t tokens) {
  const KVShape& s = cache.shape();
  const Operand k(DType::f32, {s.batch, s.heads, tokens, s.head_dim});
  const Operand v(DType::bf16, {s.batch, s.heads, tokens, s.head_dim}, test::Against::start);
  run(KVAppend{&cache, layer, k.view, v.view});
}

}  // namespace

TEST(paged_attention_stays_inside) {
  test::for_each_level([](const KernelTable& table) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::s8}) {
      for (const int last : {0, 1, 2, 3}) {
        if (last > 1 && dtype != DType::s8) continue;
        for (const int64_t tokens : {1, 5, 128}) {
          for (const int64_t dims : {1, 7, 16, 33}) {
            for (const int64_t length : {1, 17, 130}) {
              attend(dtype, tokens, dims, 1, length, last, table);
              attend(dtype, tokens, dims, 19, length, last, table);
            }
          }
        }
      }
    }
  });
}

TEST(appending_stays_inside) {
  test::for_each_level([](const KernelTable&) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::s8}) {
      for (const int64_t dims : {1, 7, 16, 33}) {
        KVCache cache(KVShape{1, 2, 3, dims, 100, 16, dtype});
        for (const int64_t tokens : {1, 0, 14, 3, 40}) append(cache, 0, tokens);
        CHECK(cache.length(0, 0) == 58 && cache.length(0, 1) == 58);
      }
    }
  });
}

TEST(pages_are_copied_when_a_sharer_writes) {
  KVCache cache(KVShape{2, 2, 1, 4, 64, 8, DType::f32});
  append(cache, 0, 20);
  append(cache, 1, 20);
  const int64_t page = cache.nbytes() / 12;  // 2 layers, 2 sequences, 3 pages
  KVCache other = cache.fork({1, 1, 0});
  CHECK(other.nbytes() == 12 * page);
  const KVSnapshot before = cache.snapshot(0);
  append(other, 0, 1);
  CHECK(other.nbytes() == 13 * page);  // three last pages where two were shared
  const KVSnapshot after = other.snapshot(0);
  const PagedKeys a = before.paged(), b = after.paged();
  CHECK(a.stride == 3 && b.stride == 3);
  CHECK(a.pages[0] == b.pages[2 * 3] && a.pages[2] != b.pages[2 * 3 + 2]);
  cache.truncate(0, 16);
  CHECK(cache.nbytes() == 10 * page);
  CHECK(cache.length(0, 0) == 16 && cache.length(0, 1) == 20);
  CHECK(before.longest() == 20 && a.pages[2] != nullptr);
}

TEST(a_plan_that_came_too_late_changes_nothing) {
  KVCache cache(KVShape{1, 1, 1, 4, 64, 8, DType::f32});
  append(cache, 0, 3);
  const KVCache::Append first = cache.plan(0, 2), second = cache.plan(0, 1);
  CHECK(first.sequences[0].pages[0] != second.sequences[0].pages[0]);
  CHECK(cache.commit(first));
  CHECK(!cache.commit(second));
  CHECK(cache.length(0, 0) == 5);
}

TEST(caches_refuse_what_does_not_fit) {
  CHECK_THROWS(ShapeError, "KVCache: page must lie", check_sizes({1, 1, 1, 4, 8, 0, DType::f32}));
  KVCache cache(KVShape{1, 1, 1, 4, 8, 8, DType::f32});
  CHECK_THROWS(ShapeError, "KVCache.append: layer", append(cache, 1, 1));
  CHECK_THROWS(ShapeError, "KVCache.append: k must fit into max_tokens = 8", append(cache, 0, 9));
  const Operand k(DType::f32, {1, 1, 2, 4}), v(DType::f32, {1, 1, 3, 4});
  CHECK_THROWS(ShapeError, "KVCache.append: v must have", run(KVAppend{&cache, 0, k.view, v.view}));
  CHECK_THROWS(DtypeError, "KVCache.append: cache is required",
               run(KVAppend{nullptr, 0, k.view, k.view}));
  CHECK_THROWS(DtypeError, "KVCache.append: cache is required", check_operands(KVAppend{}));
  CHECK_THROWS(DtypeError, "KVCache.append: k is required", run(KVAppend{&cache, 0}));
}

// A program: a list of op descriptors, recorded once and run again and again by one call.
//
//     Program program;
//     program.add(Matmul{…});          // copies the descriptor and its lists of views
//     program.add(ActivationForward{…});
//     program.plan({{h, bytes}});      // memory that only the program uses becomes part of an arena
//     program.run();
//
// Every step goes through its op's own front door: checks, choice of kernel and bits are those of the
// call that was recorded. What may differ from run to run: where the inputs are (rebind), the
// numbers of a step (numbers), the tokens of a KVCache.
//
// Memory: a view whose first element lies in one of the temporaries that plan() is given is moved
// into the arena, where temporaries that are never needed at the same time share room; those of a GPU
// into one there. The others stay where they are: the caller keeps them alive.
//
// On a GPU a run launches the steps' kernels on the caller's stream, in order, without waiting. Where
// it would do what the one before did, at the same addresses and with the same numbers, they become a
// CUDA graph, and the runs that follow launch that.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/graph.h"
#include "tilewright/kvcache.h"
#include "tilewright/ops.h"

namespace tilewright {

// A field of a descriptor that is no view.
struct Number {
  enum Kind : uint8_t { f32, f64, s32, s64, u64, boolean, choice, pointer };
  Kind kind;
  void* at;

  void set(double value) const;  // of all but choice, pointer and u64
  size_t size() const;
};

// What is told about each field of a descriptor, in order.
class Fields {
 public:
  virtual ~Fields() = default;
  virtual void view(View&) {}
  virtual void number(const Number&) {}
};

// Attention to a layer of a KVCache, as long as it is when the step runs.
struct CachedAttention {
  Attention op;
  std::function<KVSnapshot()> keys;
  const void* cache;  // who it is, and the layer
  int64_t layer;
};
void run(const CachedAttention& op);

struct CachedAppend {
  View k, v;
  std::function<void(const View& k, const View& v)> append;
  const void* cache;
  int64_t layer;
};
void run(const CachedAppend& op);

class ProgramStep {
 public:
  virtual ~ProgramStep() = default;
  virtual const char* name() const = 0;
  virtual void run() const = 0;
  virtual bool is_the_same_each_time() const = 0;  // but for its fields
  virtual void visit(Fields& fields) = 0;
};

struct Memory {
  const void* data;
  int64_t bytes;
  Device device = Device::cpu;
  bool holds(const void* p) const {
    return p >= data && p < static_cast<const char*>(data) + bytes;
  }
};

class Program {
 public:
  template <class Op>
  void add(const Op& op);

  int64_t size() const { return int64_t(steps_.size()); }
  ProgramStep& step(int64_t i) { return *steps_[size_t(i)]; }
  int64_t done() const { return done_; }  // steps of the last run that ended

  // Inputs, to be rebound, and temporaries: disjoint. The arena of a GPU is the caller's to allocate,
  // and to keep.
  using Allocate = std::function<void*(int64_t bytes)>;
  void plan(const std::vector<Memory>& inputs, const std::vector<Memory>& temporaries,
            const Allocate& on_gpu = {});
  void rebind(int64_t input, void* data);
  void changed() { graph_.reset(), unchanged_ = 0; }  // a field of a step was written
  int64_t arena_bytes() const { return arena_bytes_ + gpu_arena_bytes_; }
  void poison();  // every byte of the CPU's arena becomes 0xff: NaN

  // Throws what a step throws: done() steps were finished before. One thread at a time.
  // tw.stats counts it under `kind`, a literal, or as "graph".
  void run(const char* kind = "replay");

 private:
  struct Free {
    void operator()(void* p) const;
  };
  void run_steps();
  bool run_as_graph();

  std::vector<std::unique_ptr<ProgramStep>> steps_;
  std::vector<std::vector<std::pair<View*, int64_t>>> inputs_;  // bytes from the first element
  std::unique_ptr<char, Free> arena_;
  int64_t arena_bytes_ = 0, gpu_arena_bytes_ = 0, done_ = 0;
  std::unique_ptr<const cuda::Graph> graph_;
  bool may_be_graph_ = false;
  int64_t unchanged_ = 0;  // runs since a field was written
};

}  // namespace tilewright

// Every call of a kernel, from its front door on: counted, and described where somebody asked.
//
//   tw.stats()           calls by (op, kernel, ISA level), and fallbacks by reason: always counted
//   tw.explain(op, …)    a CallRecord of each call that this thread makes while a Recording lives
//   TILEWRIGHT_TRACE=1   one CSV line per call on standard error, the template line first: the one
//                        place where the library prints, and only when asked to
//
// A front door makes a Trace; the algorithms below name the kernel they chose and say why
// (Trace::kernel, detail, note, fallback). What is read of it: tilewright/stats.h.
#pragma once
#include <stdint.h>

#include <chrono>
#include <memory>
#include <string>

#include "tilewright/stats.h"

namespace tilewright {

class Trace {
 public:
  // The names are string literals. `shape` is a callable that returns the text.
  template <class Shape>
  Trace(const char* op, const char* isa, Shape shape) : op_(op), kernel_(op), isa_(isa) {
    if (CallRecord* r = new_record()) begin(*r, shape());
    enter();
  }
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  // Of the call that this thread is in; nothing happens outside of one.
  static void kernel(const char* name);
  static bool described();  // whether texts are wanted: ask before building one
  static void detail(const char* name, std::string value);
  static void note(std::string text);
  // Something slower than usual was done, and why (a literal): counted, and a note.
  static void fallback(const char* reason);
  // A parallel region ran.
  static void region(int64_t tasks, int threads);

 private:
  static CallRecord* record();
  CallRecord* new_record();
  void begin(CallRecord& r, std::string shape);
  void enter();
  void finish();

  const char* op_;
  const char* kernel_;
  const char* isa_;
  Trace* outer_ = nullptr;           // the call that made this one
  CallRecord* record_ = nullptr;     // of a Recording, or own_
  std::unique_ptr<CallRecord> own_;  // for the CSV line
  std::chrono::steady_clock::time_point start_;
};

}  // namespace tilewright

// Which kernels ran: counts of all calls, and descriptions of one thread's.
//
//     Recording recording;
//     run(op);
//     for (const CallRecord& call : recording.calls) …
#pragma once
#include <stdint.h>

#include <deque>
#include <string>
#include <utility>
#include <vector>

namespace tilewright {

struct CallRecord {
  std::string op, kernel, isa, shape;
  std::vector<std::pair<std::string, std::string>> details;  // tile, blocking: name, value
  std::vector<std::string> notes;                            // why something faster was not taken
  int threads = 1;                                           // of the widest parallel region
  int64_t tasks = 0;                                         // of that region; 0: there was none
  double microseconds = 0;
};

// While it lives, the calls of this thread are described in `calls`. Recordings nest: a call is in
// the innermost one.
class Recording {
 public:
  Recording();
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  std::deque<CallRecord> calls;

 private:
  Recording* outer_;
};

struct CallCount {
  const char *op, *kernel, *isa;  // of a fallback: `kernel` is the reason, `isa` is ""
  int64_t count;
};
// Since the process started. The same names may come more than once: add their counts up.
std::vector<CallCount> call_counts();
std::vector<CallCount> fallback_counts();

}  // namespace tilewright

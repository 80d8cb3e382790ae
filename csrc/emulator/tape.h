// Launches kept instead of run, to be run later as often as wanted: what stream capture and graphs are
// to CUDA. Host's view, as emulator.h.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

#include "emulator/emulator.h"

namespace tilewright::emulator {

class Tape {
 public:
  Tape() = default;
  ~Tape();  // gives the memory back
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  // Between the two, launches of this thread are added. Memory that is allocated is the tape's: each
  // play() begins with fresh bytes there; none may be released that was there before.
  void start();
  void stop();
  void play() const;
  std::size_t size() const { return launches_.size(); }

 private:
  friend void run(const Launch& launch);
  friend void* allocate(std::size_t bytes);
  friend void release(void* pointer);
  void add(const Launch& launch);
  bool owns(const void* pointer) const;

  struct Kept {
    Launch launch;
    std::unique_ptr<std::byte[]> parameters;
    std::vector<Parameter> single;
  };
  struct Memory {
    void* data;
    std::size_t bytes;
  };
  std::vector<Kept> launches_;
  std::vector<Memory> memory_;
};

extern thread_local Tape* recording;  // of this thread

}  // namespace tilewright::emulator

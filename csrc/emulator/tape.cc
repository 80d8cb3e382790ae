#include "emulator/tape.h"

#include <algorithm>
#include <cstring>

#include "emulator/machine.h"

namespace tilewright::emulator {

thread_local Tape* recording = nullptr;

Tape::~Tape() {
  for (const Memory& m : memory_) release(m.data);
}

void Tape::start() {
  if (recording) throw DeviceError("a tape is running in this thread");
  recording = this;
}

void Tape::stop() {
  recording = nullptr;
}

void Tape::play() const {
  for (const Memory& m : memory_) std::memset(m.data, kPoison, m.bytes);
  for (const Kept& kept : launches_) run(kept.launch);
}

// The parameters are copied: the caller's are gone when the launch is run.
void Tape::add(const Launch& launch) {
  Kept kept{launch, std::make_unique<std::byte[]>(launch.parameter_bytes), {}};
  std::memcpy(kept.parameters.get(), launch.parameters, launch.parameter_bytes);
  const auto* const from = static_cast<const std::byte*>(launch.parameters);
  for (const Parameter& p : launch.single) {
    const auto at = static_cast<const std::byte*>(p.data) - from;
    kept.single.push_back({kept.parameters.get() + at, p.size});
  }
  kept.launch.parameters = kept.parameters.get();
  kept.launch.single = kept.single;
  launches_.push_back(std::move(kept));
}

bool Tape::owns(const void* pointer) const {
  return std::any_of(memory_.begin(), memory_.end(),
                     [pointer](const Memory& m) { return m.data == pointer; });
}

}  // namespace tilewright::emulator

// What the emulator has to say about a kernel, collected until the launch ends.
#pragma once
#include <string>
#include <vector>

#include "emulator/machine.h"

namespace tilewright::emulator {

// The same line of source; names are compared only if the pointers differ.
bool same_site(const Site& a, const Site& b);

// "file:line", or "?" without debug information.
std::string text_of(Site site);
// Looks all of them up at once: it takes an external program, whose start is what costs.
void look_up(const std::vector<const void*>& addresses);

// Records a finding, once for each `kind` and site: a fault in a loop is told once.
void report(const std::string& kind, Site site, const std::string& detail);
// The same, and the kernel ends: it could not go on sensibly.
[[noreturn]] void fail(const std::string& kind, Site site, const std::string& detail);

}  // namespace tilewright::emulator

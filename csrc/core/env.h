// The only getenv of the library, and the table of every variable it reads.
#pragma once
#include <string>
#include <vector>

namespace tilewright::env {

struct Variable {
  const char* name;
  const char* meaning;
};

const std::vector<Variable>& variables();
std::string get(const char* name);               // "" when unset
long get_int(const char* name, long otherwise);  // `otherwise` when unset or not a number;
                                                 // the first of a list ("4,2")
bool poison();                                   // TILEWRIGHT_POISON=1, read once

}  // namespace tilewright::env

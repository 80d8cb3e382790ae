// The whole test framework: TEST registers a function, CHECK counts what fails, main() runs them
// all, or those whose names contain its argument.
//
//     TEST(sums_are_right) { CHECK(1 + 1 == 2); }
//     CHECK_THROWS(ShapeError, "matmul: b must have", run(op));
#pragma once
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

namespace test {

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline bool add(const char* name, void (*run)()) {
  cases().push_back({name, run});
  return true;
}
inline int failures = 0;
inline void fail(const char* file, int line, const std::string& what) {
  if (++failures <= 20) std::printf("%s:%d: %s\n", file, line, what.c_str());
}

}  // namespace test

#define TEST(name)                                                 \
  static void name();                                              \
  static const bool name##_is_registered = test::add(#name, name); \
  static void name()
#define CHECK(condition) \
  if (!(condition)) test::fail(__FILE__, __LINE__, #condition)
#define CHECK_THROWS(Error, text, expression)                                  \
  try {                                                                        \
    expression;                                                                \
    test::fail(__FILE__, __LINE__, "no " #Error " from " #expression);         \
  } catch (const Error& error) {                                               \
    if (!std::strstr(error.what(), text)) {                                    \
      test::fail(__FILE__, __LINE__, std::string("message: ") + error.what()); \
    }                                                                          \
  }

int main(int count, char** arguments) {
  for (const test::Case& c : test::cases()) {
    if (count > 1 && !std::strstr(c.name, arguments[1])) continue;
    const int before = test::failures;
    try {
      c.run();
    } catch (const std::exception& e) {
      test::fail(c.name, 0, std::string("exception: ") + e.what());
    }
    std::printf("%-7s %s\n", test::failures == before ? "ok" : "FAILED", c.name);
  }
  return test::failures != 0;
}

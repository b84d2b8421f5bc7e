// A few macros for the C++ tests: each file tests/cpp/<subject>_test.cpp is one program.
//
//   TEST(pool_runs_every_lane) { CHECK(n == 4); CHECK_EQ(a, b); CHECK_THROWS(ErrorCode::kImage,
//   f()); }
//
// A failed check prints where and what and lets the test go on; the program's exit status is 1
// then. `program --list` names the tests, `program NAME...` runs those whose name contains one of
// NAME, and `program --first NAME...` ends with the first failure. A NIGHTLY_TEST, the whole of
// what another one samples, is run only when it is named.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "base/error.h"

namespace check {

// How many random trials to make where `full` are wanted: a quarter where sanitizers watch, which
// make each several times as slow.
constexpr int trials(int full) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return full < 4 ? 1 : full / 4;
#else
  return full;
#endif
}

struct Case {
  const char* name;
  void (*body)();
  bool nightly;
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline int checks = 0, failures = 0;
inline bool ends_with_the_first = false;
struct Registration {
  Registration(const char* name, void (*body)(), bool nightly) {
    cases().push_back({name, body, nightly});
  }
};
inline void report(bool ok, const char* file, int line, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 50) std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what.c_str());
  if (ends_with_the_first) std::_Exit(1);
}
template <class A, class B>
void report_equal(const A& a, const B& b, const char* file, int line, const char* what) {
  std::ostringstream text;
  if (!(a == b)) text << what << " (" << a << " against " << b << ")";
  report(a == b, file, line, text.str());
}

}  // namespace check

#define PUNA_TEST(name, nightly)                                                      \
  static void test_##name();                                                          \
  static const check::Registration registration_##name(#name, &test_##name, nightly); \
  static void test_##name()
#define TEST(name) PUNA_TEST(name, false)
#define NIGHTLY_TEST(name) PUNA_TEST(name, true)
#define CHECK(condition) check::report((condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(a, b) check::report_equal((a), (b), __FILE__, __LINE__, #a " == " #b)
#define CHECK_THROWS(expected_code, expression)                                       \
  do {                                                                                \
    bool thrown = false;                                                              \
    try {                                                                             \
      (void)(expression);                                                             \
    } catch (const puna::Error& error) {                                              \
      thrown = error.code() == (expected_code);                                       \
      if (!thrown) std::fprintf(stderr, "other error: %s\n", error.what());           \
    }                                                                                 \
    check::report(thrown, __FILE__, __LINE__, #expression " throws " #expected_code); \
  } while (false)

int main(int argc, char** argv) {
  int run = 0;
  if (argc > 1 && !std::strcmp(argv[1], "--first")) {
    check::ends_with_the_first = true;
    --argc;
    ++argv;
  }
  for (const check::Case& test : check::cases()) {
    bool wanted = argc < 2 && !test.nightly;
    for (int i = 1; i < argc; ++i) wanted |= std::strstr(test.name, argv[i]) != nullptr;
    if (argc == 2 && !std::strcmp(argv[1], "--list")) {
      std::printf("%s\n", test.name);
      continue;
    }
    if (!wanted) continue;
    ++run;
    try {
      test.body();
    } catch (const std::exception& error) {
      check::report(false, test.name, 0, std::string("unexpected exception: ") + error.what());
    }
  }
  std::printf("%d tests, %d checks, %d failures\n", run, check::checks, check::failures);
  return check::failures ? 1 : 0;
}

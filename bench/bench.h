// What the subcommands of puna-bench share: arguments, timing beside the machine's ceilings, and
// reports as a table or as JSON.
//
// The machine may be busy with other work. So what is to be compared is run in turns, round by
// round, and medians over the rounds are compared; a ceiling is sampled in the same rounds.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <ostream>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/kernel_table.h"
#include "platform/memory.h"
#include "platform/thread_pool.h"

namespace puna::bench {

// One option of a subcommand: `--name VALUE`, or a flag if `value` is null.
struct Option {
  const char* name;
  const char* value;
  const char* help;
};

// Parses the arguments after the subcommand. Throws InvalidRequest for anything not in `options`.
class Arguments {
 public:
  Arguments(std::string command, std::vector<Option> options, int argc, char** argv);

  bool wants_help() const { return has("help"); }
  std::string help() const;

  bool has(const std::string& name) const { return given_.count(name) > 0; }
  std::string text(const std::string& name, const std::string& otherwise) const;
  int64_t integer(const std::string& name, int64_t otherwise, int64_t low, int64_t high) const;
  int64_t bytes(const std::string& name, int64_t otherwise) const;  // such as 3GiB

 private:
  std::string command_;
  std::vector<Option> options_;
  std::map<std::string, std::string> given_;
};

double median(std::vector<double> values);

// Seconds that one call takes.
double seconds_of(const std::function<void()>& run);

// Something to measure: `work` operations or bytes a run, and the time of each run so far.
struct Case {
  std::string name;
  double work = 0;
  std::function<void()> run;
  std::vector<double> seconds;

  void sample() { seconds.push_back(seconds_of(run)); }
  double median_rate() const { return work / median(seconds); }
  double best_rate() const;
};

// What this machine can do with `pool`'s threads and the instructions of `kernels`.
class Ceilings {
 public:
  Ceilings(const KernelTable& kernels, ThreadPool& pool);

  // Runs each ceiling once; to be called in the rounds of whatever is compared with them.
  void sample();

  // Medians of the samples so far. Bytes per second of the fastest way of reading 1 GiB.
  double read() const;
  double bf16() const { return bf16_.median_rate(); }  // operations per second
  double f32() const { return f32_.median_rate(); }
  double int8() const { return int8_.median_rate(); }

  // The memory that is read: kBytes of small normal numbers, taken as bfloat16 or as float. It is
  // far larger than any cache, and may be used as weights, quantised ones too.
  static constexpr int64_t kBytes = int64_t{1} << 30;
  const void* memory() const { return memory_.data(); }

 private:
  Memory memory_;
  std::vector<Case> reads_;
  Case bf16_, f32_, int8_;
};

// What came out: facts about the run, and rows of figures that share their columns.
class Report {
 public:
  using Value = std::variant<std::string, int64_t, double>;
  using Fields = std::vector<std::pair<std::string, Value>>;

  void fact(std::string name, Value value) {
    facts_.emplace_back(std::move(name), std::move(value));
  }
  void row(Fields fields) { rows_.push_back(std::move(fields)); }
  void print(std::ostream& out, bool json) const;

 private:
  Fields facts_;
  std::vector<Fields> rows_;
};

// The subcommands; the table is in main.cpp.
int run_ops(int argc, char** argv);
int run_model(int argc, char** argv);
int run_kv_decode(int argc, char** argv);
int run_resume(int argc, char** argv);
int run_vision(int argc, char** argv);
int run_cuda(int argc, char** argv);

}  // namespace puna::bench

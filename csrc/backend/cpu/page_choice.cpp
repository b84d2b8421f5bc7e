#include "backend/cpu/page_choice.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "backend/cpu/attention_leaf.h"

namespace puna {
namespace {

using Kind = AttentionMode::Kind;

constexpr double kNothing = -std::numeric_limits<double>::infinity();

// Estimates go by sums and exponentials of fp32, whose relative errors this covers.
constexpr float kFloatErrors = 0x1p-19f;
// Estimates of a row's whole weight may be too large: the first round aims at a part of tau, so
// that the second seldom has work to do.
constexpr double kFirstTau = 0.5;

// splitmix64: which pages are in a sample.
uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Of how many pages one is in the sample; 0: none.
int64_t sample_step(const AttentionMode& mode) {
  return mode.kind == Kind::kBudget && mode.sample > 0 ? std::llround(1 / mode.sample) : 0;
}

// What the lower bits change a score by at most, but for a share of `delta` (Hoeffding's bound for
// a sum of independent numbers between -7.5 and 7.5 times |q * scale|).
float margin_of(const ScreenedRow& row, double delta) {
  const double probable = delta > 0 ? std::sqrt(2 * std::log(1 / delta) * row.squares) : INFINITY;
  const double lower = std::min<double>(probable, row.dropped);
  return static_cast<float>(lower) + row.rounding + std::fabs(row.top) * kFloatErrors;
}

// Log of the most that a page can weigh whose keys all had the best end of every channel's range.
// `best` and `middle` are of RankSealed: their difference is the sum of |q * scale| times half of
// the levels, from which follows what the words of a query can be off by, half a step for each of
// `head_dim` codes. The rest is rounding.
float most_of_ranges(float best, float middle, int64_t head_dim) {
  constexpr float kMostWord = 32512.0f;
  const float spread = best - middle;
  const float words = spread * static_cast<float>(head_dim) / kMostWord;
  return best + std::log(static_cast<float>(kPageTokens)) + words +
         (std::fabs(best) + std::fabs(middle) + spread) * kFloatErrors;
}

}  // namespace

struct PageChoice::Scores {
  Scores(char* memory, int64_t group, int64_t pages, int64_t head_dim) : pages(pages) {
    Carver carver(memory);
    estimate = carver.take<float>(group * pages);
    most = carver.take<float>(group * pages);
    keys = carver.take<float>(pages);
    order = carver.take<int32_t>(pages);
    screened = carver.take<ScreenedRow>(group);
    kernel = carver.take<char>(group * kSealedScratch);
    own = LeafState::take(carver, group, head_dim);
    visible = carver.take<int32_t>(group);
    used = carver.used();
  }

  int64_t pages, used;
  float *estimate, *most;  // [group][pages]: logs of weights, or ranks
  float* keys;             // [pages]
  int32_t* order;          // pages that may be left out
  ScreenedRow* screened;   // [group]
  char* kernel;
  LeafState own;  // of the query's own page
  int32_t* visible;
};

void PageChoice::build(const AttentionInput& input, const AttentionPlan& plan,
                       const KernelTable& kernels) {
  input_ = &input;
  plan_ = &plan;
  kernels_ = &kernels;
  group_ = input.heads / input.layout.kv_heads;
  most_pages_ = 0;
  items_.clear();
  marks_.clear();
  rows_.clear();
  unread_.clear();
  first_item_.assign(plan.queries().size(), -1);
  for (size_t q = 0; q < plan.queries().size(); ++q) {
    const AttentionPlan::Query& query = plan.queries()[q];
    const AttentionMode* mode = query.segment->mode;
    if (mode == nullptr || mode->kind == Kind::kExact) continue;
    first_item_[q] = items();
    most_pages_ = std::max(most_pages_, query.page);
    for (int64_t head = 0; head < input.layout.kv_heads; ++head) {
      items_.push_back(
          {static_cast<int64_t>(q), head, query.page, static_cast<int64_t>(marks_.size()), mode});
      marks_.resize(marks_.size() + static_cast<size_t>(query.page), uint8_t{1});
    }
  }
  rows_.assign(items_.size() * static_cast<size_t>(group_), {kNothing, 0, 0, 0});
}

int64_t PageChoice::scratch_bytes() const {
  return Scores(nullptr, group_, most_pages_, input_->layout.head_dim).used;
}

const uint8_t* PageChoice::page_data(const Item& item, int64_t page) const {
  const AttentionSegment& segment = *plan_->queries()[item.query].segment;
  return static_cast<const uint8_t*>(segment.sealed[page]);
}

const uint16_t* PageChoice::key_scales(const Item& item, int64_t page) const {
  const KvSealedLayout& layout = input_->sealed;
  const AttentionSegment& segment = *plan_->queries()[item.query].segment;
  const uint8_t* scales = nullptr;  // of all heads
  if (const uint8_t* data = page_data(item, page); data != nullptr)
    scales = data + layout.key_scale_offset(0);
  else if (!segment.key_scales.empty())
    scales = static_cast<const uint8_t*>(segment.key_scales[page]);
  if (scales == nullptr) return nullptr;
  return reinterpret_cast<const uint16_t*>(scales + static_cast<size_t>(item.kv_head) *
                                                        layout.key_scale_bytes());
}

bool PageChoice::skippable(const Item& item, int64_t page) const {
  return input_->sealed.format != KvSeal::kNone && key_scales(item, page) != nullptr;
}

void PageChoice::choose(int64_t index, char* scratch) {
  const Item& item = items_[index];
  Scores scores(scratch, group_, item.pages, input_->layout.head_dim);
  if (item.mode->kind == Kind::kBudget) return rank(item, scores);
  screen(item, scores);
  attend_own(item, scores);
  // Weights of all pages in memory, as estimated, and of its own.
  std::vector<double> totals(static_cast<size_t>(group_));
  for (int64_t g = 0; g < group_; ++g) {
    const float* row = scores.estimate + g * item.pages;
    float top = scores.own.m[g];
    for (int64_t p = 0; p < item.pages; ++p) top = std::max(top, row[p]);
    double sum = scores.own.l[g] * std::exp(static_cast<double>(scores.own.m[g]) - top);
    for (int64_t p = 0; p < item.pages; ++p) sum += std::exp(static_cast<double>(row[p]) - top);
    totals[g] = top + std::log(sum);
  }
  certify(item, index, scores, totals.data(), item.mode->tau * kFirstTau, 0);
}

void PageChoice::attend_own(const Item& item, Scores& scores) const {
  const KvPageLayout& layout = input_->layout;
  const AttentionPlan::Query& query = plan_->queries()[item.query];
  const AttentionPlan::PageView page = plan_->page(query, query.page);
  scores.own.clear(group_, layout.head_dim);
  std::fill_n(scores.visible, group_, page.tokens);
  AttendPage call = {};
  call.q = input_->qkv.row(query.row) + item.kv_head * group_ * layout.head_dim;
  call.q_stride = layout.head_dim;
  call.visible = scores.visible;
  call.k = page.data + layout.key_offset(item.kv_head);
  call.v = page.data + layout.value_offset(item.kv_head);
  call.rows = static_cast<int32_t>(group_);
  call.head_dim = static_cast<int32_t>(layout.head_dim);
  call.tokens = page.tokens;
  call.m = scores.own.m;
  call.l = scores.own.l;
  call.o = scores.own.o;
  call.scores = reinterpret_cast<float*>(scores.kernel);
  (layout.dtype == DType::kF32 ? kernels_->attend_page_f32 : kernels_->attend_page_bf16)(call);
}

void PageChoice::screen(const Item& item, Scores& scores) const {
  const KvSealedLayout& layout = input_->sealed;
  const int64_t n = layout.head_dim, head = item.kv_head;
  const float* q = input_->qkv.row(plan_->queries()[item.query].row) + head * group_ * n;
  std::vector<float> best(static_cast<size_t>(group_)), middle(best.size());
  for (int64_t page = 0; page < item.pages; ++page) {
    const auto put = [&](int64_t g, float estimate, float most) {
      // What is not a number must be read, to show.
      const bool number = !std::isnan(estimate) && !std::isnan(most);
      scores.estimate[g * item.pages + page] = number ? estimate : INFINITY;
      scores.most[g * item.pages + page] = number ? most : INFINITY;
    };
    const uint8_t* data = page_data(item, page);
    if (data == nullptr || !skippable(item, page)) {
      // Of a page that streams the ranges of its channels are known at most: how much it may weigh,
      // and, as an estimate, what it weighs if all keys are in the middle.
      const bool known = skippable(item, page);
      if (known) rank_page(item, page, q, best.data(), middle.data());
      for (int64_t g = 0; g < group_; ++g)
        put(g, known ? middle[g] + std::log(static_cast<float>(kPageTokens)) : -INFINITY,
            known ? most_of_ranges(best[g], middle[g], n) : -INFINITY);
      continue;
    }
    const bool next = page + 1 < item.pages && page_data(item, page + 1) != nullptr;
    ScreenSealed call = {};
    call.q = q;
    call.q_stride = n;
    call.upper = data + layout.upper_offset(head);
    call.key_scales = key_scales(item, page);
    if (next) call.next_upper = page_data(item, page + 1) + layout.upper_offset(head);
    call.rows = static_cast<int32_t>(group_);
    call.head_dim = static_cast<int32_t>(n);
    call.screened = scores.screened;
    call.scratch = scores.kernel;
    const bool int8 = layout.format == KvSeal::kInt8;
    (int8 ? kernels_->screen_sealed_int8 : kernels_->screen_sealed_int4)(call);
    for (int64_t g = 0; g < group_; ++g) {
      const ScreenedRow& row = scores.screened[g];
      const float estimate = row.top + std::log(row.mass);
      put(g, estimate, estimate + margin_of(row, item.mode->delta));
    }
  }
}

void PageChoice::certify(const Item& item, int64_t index, Scores& scores, const double* totals,
                         double tau, int round) {
  uint8_t* marks = marks_.data() + item.marks;
  int64_t count = 0;
  for (int64_t page = 0; page < item.pages; ++page) {
    if (!skippable(item, page) || (round > 0 && marks[page] != 0)) continue;
    float key = -INFINITY;
    for (int64_t g = 0; g < group_; ++g) {
      const double share = scores.most[g * item.pages + page] - totals[g];
      key = std::isnan(share) ? INFINITY : std::max(key, static_cast<float>(share));
    }
    scores.keys[page] = key;
    scores.order[count++] = static_cast<int32_t>(page);
  }
  std::sort(scores.order, scores.order + count, [&](int32_t a, int32_t b) {
    return std::pair(scores.keys[a], a) < std::pair(scores.keys[b], b);
  });
  std::vector<double> skipped(static_cast<size_t>(group_), 0.0);
  int64_t left_out = 0;
  std::vector<double> with(skipped.size());
  for (; left_out < count; ++left_out) {
    const int32_t page = scores.order[left_out];
    bool fits = scores.keys[page] < INFINITY;
    for (int64_t g = 0; g < group_; ++g) {
      with[g] = skipped[g] + std::exp(scores.most[g * item.pages + page] - totals[g]);
      fits = fits && with[g] <= tau;
    }
    if (!fits) break;
    skipped.swap(with);
    marks[page] = 0;
  }
  for (; left_out < count; ++left_out)
    marks[scores.order[left_out]] = static_cast<uint8_t>(1 << round);
  for (int64_t g = 0; g < group_; ++g)
    rows_[index * group_ + g].skipped = std::log(skipped[g]) + totals[g];
}

void PageChoice::choose_more(int64_t index, const float* m, const double* l, char* scratch) {
  const Item& item = items_[index];
  if (item.mode->kind == Kind::kBudget) {
    for (int64_t g = 0; g < group_; ++g) {
      rows_[index * group_ + g].first_m = m[g];
      rows_[index * group_ + g].first = l[g];
    }
    return;
  }
  std::vector<double> totals(static_cast<size_t>(group_));
  bool enough = true;
  for (int64_t g = 0; g < group_; ++g) {
    totals[g] = m[g] + std::log(l[g]);
    // A row whose weights are not numbers has no more to learn.
    enough = enough && !(rows_[index * group_ + g].skipped > totals[g] + std::log(item.mode->tau));
  }
  if (enough) return;
  Scores scores(scratch, group_, item.pages, input_->layout.head_dim);
  screen(item, scores);
  certify(item, index, scores, totals.data(), item.mode->tau, 1);
}

void PageChoice::rank_page(const Item& item, int64_t page, const float* q, float* most,
                           float* middle) const {
  const KvSealedLayout& layout = input_->sealed;
  RankSealed call = {};
  call.q = q;
  call.q_stride = layout.head_dim;
  call.key_scales = key_scales(item, page);
  call.levels = static_cast<float>((1 << layout.bits()) - 1);
  call.rows = static_cast<int32_t>(group_);
  call.head_dim = static_cast<int32_t>(layout.head_dim);
  call.most = most;
  call.middle = middle;
  kernels_->rank_sealed(call);
}

void PageChoice::rank(const Item& item, Scores& scores) {
  const AttentionMode& mode = *item.mode;
  const int64_t n = input_->sealed.head_dim;
  const float* q = input_->qkv.row(plan_->queries()[item.query].row) + item.kv_head * group_ * n;
  uint8_t* marks = marks_.data() + item.marks;
  std::vector<float> most(static_cast<size_t>(group_)), middle(static_cast<size_t>(group_));
  std::vector<float> best_most(most.size(), -INFINITY), best_middle(most.size(), -INFINITY);
  std::vector<int32_t> pages;
  for (int64_t page = 0; page < item.pages; ++page) {
    if (!skippable(item, page) || page < mode.sink_pages || page >= item.pages - mode.recent_pages)
      continue;
    pages.push_back(static_cast<int32_t>(page));
    rank_page(item, page, q, most.data(), middle.data());
    for (int64_t g = 0; g < group_; ++g) {
      scores.most[g * item.pages + page] = most[g];
      scores.estimate[g * item.pages + page] = middle[g];
      best_most[g] = std::max(best_most[g], most[g]);
      best_middle[g] = std::max(best_middle[g], middle[g]);
    }
  }
  const int64_t step = sample_step(mode);
  for (const int32_t page : pages)
    marks[page] =
        step > 0 && mixed(static_cast<uint64_t>(page)) % static_cast<uint64_t>(step) == 0 ? 2 : 0;
  // Half by either rank: each has texts that it fails on.
  const auto budget =
      static_cast<int64_t>(std::ceil(mode.fraction * static_cast<double>(item.pages)));
  const auto take = [&](const float* ranks, const std::vector<float>& best, int64_t wanted) {
    for (const int32_t page : pages) {
      float key = -INFINITY;
      for (int64_t g = 0; g < group_; ++g) {
        const float below = ranks[g * item.pages + page] - best[g];
        key = std::isnan(below) ? INFINITY : std::max(key, below);
      }
      scores.keys[page] = key;
    }
    wanted = std::min(wanted, static_cast<int64_t>(pages.size()));
    std::partial_sort(pages.begin(), pages.begin() + wanted, pages.end(),
                      [&](int32_t a, int32_t b) {
                        return std::pair(-scores.keys[a], a) < std::pair(-scores.keys[b], b);
                      });
    for (int64_t i = 0; i < wanted; ++i) marks[pages[static_cast<size_t>(i)]] = 1;
    pages.erase(pages.begin(), pages.begin() + wanted);
  };
  take(scores.most, best_most, (budget + 1) / 2);
  take(scores.estimate, best_middle, budget / 2);
}

float PageChoice::shift(int64_t query) const {
  const int64_t first = first_item_[query];
  const int64_t step = first < 0 ? 0 : sample_step(*items_[first].mode);
  return step > 0 ? static_cast<float>(std::log(static_cast<double>(step))) : 0.0f;
}

void PageChoice::add_sampled(int64_t query, int64_t head, float m, float l) {
  const int64_t first = first_item_[query];
  if (first < 0 || l == 0 || sample_step(*items_[first].mode) == 0) return;
  Row& row = rows_[(first + head / group_) * group_ + head % group_];
  const double weight = l * std::exp(static_cast<double>(m) - row.first_m);
  row.squares += weight * weight;
}

void PageChoice::tell_streams(AttentionPlan& plan, int round) {
  const int64_t heads = input_->layout.kv_heads;
  if (round == 0) unread_.assign(static_cast<size_t>(plan.stream_count()), {});
  for (int64_t stream = 0; stream < plan.stream_count(); ++stream) {
    std::vector<uint8_t> wanted(static_cast<size_t>(plan.stream_pages(stream)), 0);
    for (size_t q = 0; q < plan.queries().size(); ++q) {
      const AttentionPlan::Query& query = plan.queries()[q];
      if (query.stream != stream) continue;
      const int64_t pages = std::min(query.page, static_cast<int64_t>(wanted.size()));
      for (int64_t head = 0; head < (first_item_[q] < 0 ? 1 : heads); ++head)
        for (int64_t page = 0; page < pages; ++page)
          wanted[page] |= static_cast<uint8_t>(reads(static_cast<int64_t>(q), head, page, round));
    }
    std::vector<uint8_t>& unread = unread_[stream];
    if (round == 0) unread.assign(wanted.size(), 1);
    bool all = true, any = false;
    for (size_t page = 0; page < wanted.size(); ++page) {
      if (!plan.comes_through(stream, static_cast<int64_t>(page))) {
        wanted[page] = unread[page] = 0;
        continue;
      }
      all = all && wanted[page] != 0;
      any = any || wanted[page] != 0;
      if (wanted[page] != 0) unread[page] = 0;
    }
    // In the first round it is on its way already.
    if (round > 0 || !all) plan.want(stream, std::move(wanted), any);
  }
}

void PageChoice::report_unread() const {
  for (size_t stream = 0; stream < unread_.size(); ++stream) {
    const auto pages = std::count(unread_[stream].begin(), unread_[stream].end(), uint8_t{1});
    const auto asked = std::find_if(items_.begin(), items_.end(), [&](const Item& item) {
      return plan_->queries()[item.query].stream == static_cast<int64_t>(stream);
    });
    if (asked == items_.end()) continue;
    plan_->queries()[asked->query].segment->report->unread_bytes +=
        pages * static_cast<int64_t>(input_->sealed.page_bytes());
  }
}

void PageChoice::report(int64_t index, const float* m, const double* l) const {
  const Item& item = items_[index];
  AttentionReport& report = *plan_->queries()[item.query].segment->report;
  const uint8_t* marks = marks_.data() + item.marks;
  report.pages += item.pages;
  report.read += item.pages - std::count(marks, marks + item.pages, uint8_t{0});
  for (int64_t g = 0; g < group_; ++g) {
    const Row& row = rows_[index * group_ + g];
    if (item.mode->kind == Kind::kCertified) {
      const double share = std::exp(row.skipped - m[g]) / l[g];
      report.worst_share = std::max(report.worst_share, share);
      continue;
    }
    const int64_t step = sample_step(*item.mode);
    if (step == 0) continue;
    const double unseen = 1 - 1 / static_cast<double>(step);
    const double total = l[g] * std::exp(m[g] - row.first_m);
    report.worst_share = std::max(report.worst_share, unseen * (total - row.first) / total);
    report.worst_interval =
        std::max(report.worst_interval, 1.96 * std::sqrt(unseen * row.squares) / total);
  }
}

}  // namespace puna

// Attention that leaves out pages: what is asked for, and what was done.
//
// Only whole sealed pages are left out, each for one query and KV head (all query heads of its
// group alike). Of pages that come through a stream no more is known before they are read than the
// ranges of their keys' channels, if they have been read before; others are read and used. Which
// pages are left out follows from the query, the pages and what is known of them: not from lanes,
// from other queries of the call or from the cuts of the prompt.
#pragma once

#include <cstdint>

namespace puna {

struct AttentionMode {
  enum class Kind { kExact, kCertified, kBudget };
  Kind kind = Kind::kExact;

  // kCertified. Pages are read in the order of what they can weigh at most, as the upper four bits
  // of their keys tell, until the others weigh at most `tau` of what was read, for every head.
  // Hence an output differs from the exact one by at most 2 tau times the largest value. The lower
  // four bits are bounded with probability 1 - delta for each score, if they are independent of
  // the query and of each other; delta = 0 bounds them at their worst. (Of 4-bit keys nothing is
  // unknown.)
  double tau = 1e-3, delta = 1e-9;

  // kBudget. The first and the last pages, of the others the fraction that ranks highest by the
  // ranges of their channels, and of the rest one in so many as `sample` says, each weighed as if
  // it stood for as many. Nothing is promised.
  double fraction = 0.02, sample = 0.01;
  int64_t sink_pages = 1, recent_pages = 8;
};

// Added up over layers, queries and KV heads.
struct AttentionReport {
  int64_t pages = 0;  // sealed pages in sight
  int64_t read = 0;   // of them, as wholes
  // Of any row, the share of the softmax weight that is in pages left out: at most (kCertified), or
  // as estimated from the sample, with the half-width of its 95 % interval (kBudget).
  double worst_share = 0, worst_interval = 0;
  // Of pages in files that were not read, as no query of the call read them for any head.
  int64_t unread_bytes = 0;
};

}  // namespace puna

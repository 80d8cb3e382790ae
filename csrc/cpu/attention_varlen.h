// Attention of sequences of any lengths that lie one after the other.
#pragma once
#include <vector>

#include "cpu/attention.h"

namespace tilewright {

// Sequence i has rows [q[i], q[i + 1]) of q and keys [k[i], k[i + 1]) of k and v.
struct AttentionSequences {
  AttentionProblem all{};         // one sequence of all rows and keys; alibi_slopes (sequences, H)
  std::vector<int64_t> q, k;      // (count + 1,)
  std::vector<uint64_t> element;  // (count,): the first_element of each

  int64_t count() const { return int64_t(q.size()) - 1; }
  AttentionProblem at(int64_t i) const;
};

void attention_forward(const AttentionSequences& s, const AttentionOutput& o, const KernelTable& t);
void attention_backward(const AttentionSequences& s, const AttentionGradients& g,
                        const KernelTable& t);

}  // namespace tilewright

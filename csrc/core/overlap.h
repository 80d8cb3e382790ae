// Whether strided views share memory: exactly, not only by the ranges of their addresses.
//
// Two views share a byte where a bounded linear equation has a solution (core/overlap.cc). Deciding
// that is NP-hard for strides in general, and quick for those of arrays; a search that exceeds its
// limit answers "yes". So a shared byte is never missed, and only contrived strides are refused in
// vain.
#pragma once
#include "tilewright/view.h"

namespace tilewright {

// Some element of a shares a byte with some element of b; false where either is absent or empty.
bool share_memory(const View& a, const View& b);
// Two elements of v are the same memory: a broadcast axis, or strides that meet.
bool overlaps_itself(const View& v);
// The same pointer, dtype, shape and strides.
bool same_array(const View& a, const View& b);

}  // namespace tilewright

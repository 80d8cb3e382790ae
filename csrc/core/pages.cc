#include "core/pages.h"

#include <sys/mman.h>

#include <cstdlib>

namespace tilewright {

void* allocate_pages(size_t bytes) {
  constexpr size_t kLine = 64, kHugePage = size_t(2) << 20;
  const bool large = bytes >= 2 * kHugePage;
  const size_t unit = large ? kHugePage : kLine;
  const size_t whole = (bytes + unit - 1) / unit * unit;
  void* const data = std::aligned_alloc(unit, whole);
  if (data && large) madvise(data, whole, MADV_HUGEPAGE);  // a wish: small pages do as well
  return data;
}

}  // namespace tilewright

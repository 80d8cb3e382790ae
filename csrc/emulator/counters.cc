// Shared memory has 32 banks of 4 bytes; a wavefront takes one word from each. Accesses of 4 bytes
// go in one phase of 32 lanes, of 8 bytes in two of 16, of 16 bytes in four of 8, and a phase takes
// as many wavefronts as the busiest bank has distinct words. Global memory moves 32-byte sectors.
#include "emulator/counters.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "emulator/findings.h"

namespace tilewright::emulator {
namespace {

// One instruction of a warp.
struct Row {
  Site site;
  bool write, shared;
  unsigned bytes;
  unsigned lanes = 0;
  std::array<std::uintptr_t, kLanes> address{};
};

// The words of each bank that one phase asks for.
class Banks {
 public:
  void add(std::uintptr_t address, unsigned bytes) {
    for (std::uintptr_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
      auto& bank = words_[word % kLanes];
      int& n = count_[word % kLanes];
      if (n == static_cast<int>(kLanes) || std::find(&bank[0], &bank[n], word) != &bank[n]) {
        continue;
      }
      bank[n++] = word;
      worst_ = std::max(worst_, n);
    }
  }
  unsigned wavefronts() const { return static_cast<unsigned>(worst_); }

 private:
  std::uintptr_t words_[kLanes][kLanes + 1];
  int count_[kLanes] = {};
  int worst_ = 0;
};

void count_shared(const Row& row, Traffic& traffic) {
  const unsigned a_phase = row.bytes >= 16 ? 8 : row.bytes == 8 ? 16 : 32;
  for (unsigned first = 0; first < kLanes; first += a_phase) {
    Banks banks;
    for (unsigned lane = first; lane < first + a_phase; ++lane) {
      if (row.lanes >> lane & 1) banks.add(row.address[lane], row.bytes);
    }
    traffic.wavefronts += banks.wavefronts();
    traffic.ideal_wavefronts += banks.wavefronts() > 0;
  }
}

void count_global(const Row& row, Traffic& traffic) {
  std::vector<std::uintptr_t> sectors, starts;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (!(row.lanes >> lane & 1)) continue;
    const std::uintptr_t begin = row.address[lane], last = begin + row.bytes - 1;
    for (std::uintptr_t sector = begin / 32; sector <= last / 32; ++sector) {
      sectors.push_back(sector);
    }
    starts.push_back(begin);
  }
  const auto distinct = [](std::vector<std::uintptr_t>& all) {
    std::sort(all.begin(), all.end());
    return static_cast<std::uint64_t>(std::unique(all.begin(), all.end()) - all.begin());
  };
  traffic.sectors += distinct(sectors);
  traffic.ideal_sectors += (distinct(starts) * row.bytes + 31) / 32;
}

SiteKey key_of(Site site, bool shared, bool write) {
  return {site.where, site.line, shared, write};
}

}  // namespace

unsigned row_wavefronts(const std::uintptr_t* offsets, int rows) {
  Banks banks;
  for (int r = 0; r < rows; ++r) banks.add(offsets[r], 16);
  return banks.wavefronts();
}

void flush(Warp& warp) {
  const auto empty = [](const auto& log) { return log.empty(); };
  if (std::all_of(warp.log.begin(), warp.log.end(), empty)) return;
  static std::vector<Row> rows;  // kept for their memory; one launch runs at a time
  static std::unordered_map<SiteKey, std::vector<std::size_t>, SiteKeyHash> rows_of;
  static std::unordered_map<SiteKey, std::size_t, SiteKeyHash> executed;
  rows.clear();
  rows_of.clear();
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    executed.clear();
    for (const LogEntry& e : warp.log[lane]) {
      const SiteKey key = key_of(e.site, e.shared, e.write);
      auto& list = rows_of[key];
      const std::size_t n = executed[key]++;
      if (n == list.size()) {
        list.push_back(rows.size());
        rows.push_back({e.site, e.write, e.shared, e.bytes});
      }
      Row& row = rows[list[n]];
      row.lanes |= 1u << lane;
      row.address[lane] = e.address;
    }
    warp.log[lane].clear();
  }
  for (const Row& row : rows) {
    Traffic& traffic = machine.sites[key_of(row.site, row.shared, row.write)];
    ++traffic.instructions;
    row.shared ? count_shared(row, traffic) : count_global(row, traffic);
  }
}

void count_ldmatrix(Site site, unsigned wavefronts, unsigned ideal) {
  ++machine.counters.ldmatrix;
  machine.counters.ldmatrix_wavefronts += wavefronts;
  machine.counters.ldmatrix_ideal += ideal;
  Traffic& traffic = machine.sites[key_of(site, true, false)];
  ++traffic.instructions;
  traffic.wavefronts += wavefronts;
  traffic.ideal_wavefronts += ideal;
}

Counters take_counters() {
  std::lock_guard lock(machine.mutex);
  std::vector<const void*> addresses;
  for (const auto& [key, traffic] : machine.sites) {
    if (!key.line) addresses.push_back(key.where);
  }
  look_up(addresses);
  // Several addresses may be of one line.
  std::map<std::tuple<std::string, bool, bool>, Traffic> lines;
  for (const auto& [key, traffic] : machine.sites) {
    Traffic& line = lines[{text_of({key.where, key.line}), key.shared, key.write}];
    line.instructions += traffic.instructions;
    line.wavefronts += traffic.wavefronts;
    line.ideal_wavefronts += traffic.ideal_wavefronts;
    line.sectors += traffic.sectors;
    line.ideal_sectors += traffic.ideal_sectors;
  }
  Counters counters = machine.counters;
  for (const auto& [line, t] : lines) {
    const auto& [where, shared, write] = line;
    counters.sites.push_back({where, shared ? "shared" : "global", write, t.instructions,
                              t.wavefronts, t.ideal_wavefronts, t.sectors, t.ideal_sectors});
  }
  machine.counters = {};
  machine.sites.clear();
  return counters;
}

}  // namespace tilewright::emulator

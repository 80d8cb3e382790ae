#include "emulator/findings.h"

#include <dlfcn.h>
#include <link.h>

#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>

namespace tilewright::emulator {
namespace {

constexpr std::size_t kMostFindings = 20;
constexpr std::size_t kAddressesAtOnce = 500;  // of one command line

std::map<const void*, std::string>& resolved() {
  static std::map<const void*, std::string> lines;
  return lines;
}

std::string without_folder(const std::string& path) {
  return path.substr(path.rfind('/') + 1);
}

// binutils' addr2line for some addresses of one file; `bias` is where the loader put it.
void ask(const std::string& file, std::uintptr_t bias, const std::vector<const void*>& addresses) {
  std::string command = "addr2line -e '" + file + "'";
  for (const void* address : addresses) {
    char text[32];
    // The byte before the return address belongs to the call.
    const std::uintptr_t offset = reinterpret_cast<std::uintptr_t>(address) - bias - 1;
    std::snprintf(text, sizeof text, " 0x%zx", static_cast<std::size_t>(offset));
    command += text;
  }
  command += " 2>/dev/null";
  FILE* pipe = popen(command.c_str(), "r");
  if (!pipe) return;
  char line[PATH_MAX + 64];
  for (const void* address : addresses) {
    if (!std::fgets(line, sizeof line, pipe)) break;
    line[std::strcspn(line, " \n")] = 0;  // "file:12 (discriminator 3)"
    if (line[0] != '?') resolved()[address] = without_folder(line);
  }
  pclose(pipe);
}

std::string who(const Thread& t) {
  const auto triple = [](auto v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  return "block " + triple(t.block_index) + " thread " + triple(t.index);
}

}  // namespace

bool same_site(const Site& a, const Site& b) {
  if (a.line != b.line) return false;
  if (a.where == b.where) return true;
  return a.line && a.where && b.where &&
         !std::strcmp(static_cast<const char*>(a.where), static_cast<const char*>(b.where));
}

void look_up(const std::vector<const void*>& addresses) {
  struct Object {
    std::uintptr_t bias;
    std::vector<const void*> addresses;
  };
  std::map<std::string, Object> objects;
  for (const void* address : addresses) {
    if (!address || !resolved().try_emplace(address, "?").second) continue;
    Dl_info info;
    void* map = nullptr;
    if (!dladdr1(address, &info, &map, RTLD_DL_LINKMAP) || !map) continue;
    const auto* link = static_cast<const link_map*>(map);
    std::string file = link->l_name;
    std::error_code none;
    if (file.empty()) file = std::filesystem::read_symlink("/proc/self/exe", none).string();
    auto& object = objects.try_emplace(file, Object{link->l_addr, {}}).first->second;
    object.addresses.push_back(address);
    if (object.addresses.size() == kAddressesAtOnce) {
      ask(file, object.bias, object.addresses);
      object.addresses.clear();
    }
  }
  for (const auto& [file, object] : objects) {
    if (!object.addresses.empty()) ask(file, object.bias, object.addresses);
  }
}

std::string text_of(Site site) {
  if (site.line) {
    return without_folder(static_cast<const char*>(site.where)) + ":" + std::to_string(site.line);
  }
  if (!site.where) return "?";
  look_up({site.where});
  return resolved()[site.where];
}

void report(const std::string& kind, Site site, const std::string& detail) {
  if (machine.findings.size() >= kMostFindings) return;
  const std::string where = text_of(site);
  if (!machine.known_findings.insert(kind + where).second) return;
  const std::string place = where == "?" ? "" : " at " + where;
  machine.findings.push_back(kind + place + ": " + (current ? who(*current) + ", " : "") + detail);
}

void fail(const std::string& kind, Site site, const std::string& detail) {
  report(kind, site, detail);
  throw Fatal{};
}

}  // namespace tilewright::emulator

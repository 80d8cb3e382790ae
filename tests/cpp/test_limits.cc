// How many threads there may be: quotas of control groups, in files as the system has them.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/limits.h"
#include "core/parallel.h"
#include "test.h"
#include "tilewright/errors.h"

using namespace tilewright;

namespace {

// A root with /proc/self/cgroup and groups of its own.
class FakeRoot {
 public:
  FakeRoot() : path_(std::filesystem::temp_directory_path() / "tilewright-XXXXXX") {
    std::string name = path_.string();
    if (!mkdtemp(name.data())) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~FakeRoot() { std::filesystem::remove_all(path_); }
  void write(const std::string& file, const std::string& text) const {
    std::filesystem::create_directories((path_ / file).parent_path());
    std::ofstream(path_ / file) << text;
  }
  double quota() const { return cgroup_quota(path_.string()); }
  std::vector<ThreadLimit> limits() const { return thread_limits(path_.string()); }

 private:
  std::filesystem::path path_;
};

}  // namespace

TEST(cgroup_v2_quotas_are_read_up_to_the_root) {
  const FakeRoot root;
  CHECK(root.quota() == 0);  // no /proc
  root.write("proc/self/cgroup", "0::/outer/inner\n");
  CHECK(root.quota() == 0);
  root.write("sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n");
  CHECK(root.quota() == 0);
  root.write("sys/fs/cgroup/outer/cpu.max", "400000 100000\n");
  CHECK(root.quota() == 4);
  root.write("sys/fs/cgroup/outer/inner/cpu.max", "150000 100000\n");
  CHECK(root.quota() == 1.5);
  root.write("sys/fs/cgroup/cpu.max", "50000 100000\n");  // a container's own group
  CHECK(root.quota() == 0.5);
  for (const char* nonsense : {"", "max", "x y", "-1 100000", "100000 0", "100000"}) {
    for (const char* group : {"", "outer/", "outer/inner/"}) {
      root.write(std::string("sys/fs/cgroup/") + group + "cpu.max", nonsense);
    }
    CHECK(root.quota() == 0);
  }
}

TEST(cgroup_v1_quotas_are_read) {
  const FakeRoot root;
  root.write("proc/self/cgroup", "9:memory:/x\n4:cpu,cpuacct:/host/name\n3:cpuset:/y\n0::/\n");
  root.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n");
  CHECK(root.quota() == 0);
  root.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  CHECK(root.quota() == 3);
  root.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  CHECK(root.quota() == 0);
}

TEST(the_quota_is_one_of_the_limits) {
  const FakeRoot root;
  const auto quotas = [&] {
    std::vector<double> found;
    for (const ThreadLimit& l : root.limits()) {
      if (std::strcmp(l.source, "cgroup quota") == 0) found.push_back(l.cores);
    }
    return found;
  };
  CHECK(quotas().empty());
  root.write("proc/self/cgroup", "0::/group\n");
  root.write("sys/fs/cgroup/group/cpu.max", "150000 100000\n");
  CHECK(quotas() == std::vector{1.5});
  CHECK(root.limits().size() == thread_limits("/nowhere").size() + 1);
}

TEST(the_default_is_the_least_limit) {
  double least = 1e9;
  const auto limits = thread_limits();
  CHECK(std::strcmp(limits[0].source, "affinity") == 0);
  for (const ThreadLimit& l : limits) least = std::min(least, l.cores);
  CHECK(default_num_threads() == std::max(1, int(least + 0.5)));
}

TEST(thread_counts_have_limits) {
  CHECK_THROWS(ShapeError, "n must be at least 1, got 0", set_num_threads(0));
  CHECK_THROWS(ShapeError, "n must be at most 1024, got 5000", set_num_threads(5000));
  CHECK(default_num_threads() >= 1);
}

#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace mmrlhf {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string path = "std::thread";
};

#if defined(__linux__)
// PyTorch's runtime if there are several (scikit-learn, for one, brings its own), else the first loaded.
int consider(dl_phdr_info* info, size_t, void* found) {
  auto& best = *static_cast<std::string*>(found);
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const std::string name = slash == nullptr ? info->dlpi_name : slash + 1;
  for (const char* prefix : {"libgomp", "libiomp5", "libomp"}) {
    if (name.rfind(prefix, 0) != 0) continue;
    const bool torch = std::strstr(info->dlpi_name, "/torch") != nullptr;
    if (torch || best.empty()) best = info->dlpi_name;
    return torch ? 1 : 0;
  }
  return 0;
}

Runtime find_runtime() {
  Runtime runtime;
  std::string path;
  dl_iterate_phdr(consider, &path);
  if (path.empty()) return runtime;
  void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);  // kept: the runtime stays loaded as long as we may call it
  if (handle == nullptr) return runtime;
  runtime.parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
  if (runtime.parallel != nullptr) runtime.path = path;
  return runtime;
}
#else
Runtime find_runtime() { return {}; }
#endif

// Looked up at the first call that wants threads, when PyTorch has long been imported.
const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

// Each thread of the team takes the next share until none is left: right for any team size the runtime grants.
struct Shares {
  int64_t count;
  int64_t share;
  const std::function<void(int64_t, int64_t)>& body;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t begin; (begin = next.fetch_add(share)) < count;) body(begin, std::min(begin + share, count));
  }
};

}  // namespace

void parallel_rows(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t team = std::min<int64_t>(threads, count);
  if (team <= 1) {
    if (count > 0) body(0, count);
    return;
  }
  // Four shares a thread: a thread that the system puts aside holds up a quarter of its part, not all of it.
  Shares shares{count, std::max<int64_t>(1, count / (4 * team)), body};
  if (runtime().parallel != nullptr) {
    runtime().parallel([](void* data) { static_cast<Shares*>(data)->work(); }, &shares, static_cast<unsigned>(team), 0);
    return;
  }
  std::vector<std::thread> helpers;
  helpers.reserve(team - 1);
  for (int64_t i = 1; i < team; ++i) {
    try {
      helpers.emplace_back([&shares] { shares.work(); });
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those we have, and this one, do the rest
    }
  }
  shares.work();
  for (auto& helper : helpers) helper.join();
}

std::string threads_from() { return runtime().path; }

}  // namespace mmrlhf

#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace stf {
namespace {

struct Tasks {
  int64_t count;
  void (*body)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};

  static void work(void* self) {
    auto& tasks = *static_cast<Tasks*>(self);
    for (int64_t task; (task = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;)
      tasks.body(tasks.context, task);
  }
};

// PyTorch's OpenMP threads spin for a while after each of its loops; threads of our own would
// share the cores with them. So its pool is borrowed, whichever OpenMP runtime it loaded (all
// offer this entry point), and threads are started only where there is none.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
const auto gomp_parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));

}  // namespace

void run_tasks(int64_t count, int threads, void (*body)(void*, int64_t), void* context) {
  Tasks tasks{count, body, context};
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    Tasks::work(&tasks);
  } else if (gomp_parallel) {
    gomp_parallel(Tasks::work, &tasks, threads, 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (int i = 1; i < threads; ++i) others.emplace_back(Tasks::work, &tasks);
    } catch (const std::system_error&) {  // no more threads to be had: those there are will do
    }
    Tasks::work(&tasks);
    for (auto& other : others) other.join();
  }
}

}  // namespace stf

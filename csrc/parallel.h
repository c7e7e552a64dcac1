// Loops over independent tasks on the threads PyTorch already has.
#pragma once
#include <cstdint>

namespace stf {

// body(context, 0), ..., body(context, tasks - 1), in any order, on up to `threads` threads.
void run_tasks(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context);

namespace {

template <class Body>
void parallel_for(int64_t tasks, int threads, Body body) {
  run_tasks(
      tasks, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
      &body);
}

}  // namespace
}  // namespace stf

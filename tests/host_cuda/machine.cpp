#include "machine.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <utility>

#ifndef __x86_64__
#error "fibers switch stacks in x86-64 assembly"
#endif

// Keeps the stack pointer in *from and goes on where `to` was kept.
extern "C" void host_switch_stack(void** from, void* to);
asm(R"(
  .text
  .type host_switch_stack, @function
host_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace host {

struct Stack {
  static constexpr size_t kBytes = 256 << 10, kGuard = 4096;
  uint8_t* memory;
  void* pointer = nullptr;
  Stack() {
    memory = static_cast<uint8_t*>(mmap(nullptr, kGuard + kBytes, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
  }
  ~Stack() { munmap(memory, kGuard + kBytes); }
  void* bottom() const { return memory + kGuard; }
  void prepare(void (*entry)()) {
    __asan_unpoison_memory_region(bottom(), kBytes);
    void** top = reinterpret_cast<void**>(memory + kGuard + kBytes) - 1;
    top[0] = nullptr;  // entry's return address
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // registers
    pointer = top;
  }
};

namespace {

struct Arena {
  uint8_t* memory = static_cast<uint8_t*>(std::aligned_alloc(1024, kArena));
};

struct Machine {
  std::mutex one_launch;
  std::mt19937_64 chance{0};
  std::vector<Launch> launches;
  std::vector<std::unique_ptr<Stack>> stacks;  // not in use
  std::vector<Arena> arenas;
  std::vector<uint64_t> garbage;
  std::vector<Block> cluster;
  const std::function<void()>* kernel = nullptr;
  Thread* running = nullptr;
  std::exception_ptr thrown;
  // The scheduler's own stack.
  void* pointer = nullptr;
  void* fake = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
};

Machine& machine() {
  static Machine* it = new Machine;  // outlives every fiber
  return *it;
}

void to_scheduler(void** fake) {
  Machine& m = machine();
  Thread& thread = *m.running;
  __sanitizer_start_switch_fiber(fake, m.bottom, m.bytes);
  host_switch_stack(&thread.stack->pointer, m.pointer);
}

void fiber() {
  Machine& m = machine();
  __sanitizer_finish_switch_fiber(nullptr, &m.bottom, &m.bytes);
  try {
    (*m.kernel)();
  } catch (...) {
    m.thrown = std::current_exception();
  }
  m.running->ended = true;
  to_scheduler(nullptr);
}

void resume(Thread& thread) {
  Machine& m = machine();
  m.running = &thread;
  thread.waits_at = nullptr;
  blockIdx = thread.block->index;
  threadIdx = {thread.id};
  __sanitizer_start_switch_fiber(&m.fake, thread.stack->bottom(), Stack::kBytes);
  host_switch_stack(&m.pointer, thread.stack->pointer);
  __sanitizer_finish_switch_fiber(m.fake, nullptr, nullptr);
  if (m.thrown) std::rethrow_exception(std::exchange(m.thrown, nullptr));
}

// Runs each lane of a warp that can run until it waits; whether there was one.
bool advance(Block& block, unsigned warp) {
  const uint64_t random = chance()();
  const unsigned first = random % kLanes, stride = (random >> 8) % kLanes | 1;
  bool any = false;
  for (unsigned i = 0; i < kLanes; ++i) {
    const unsigned id = warp * kLanes + (first + i * stride) % kLanes;
    if (id >= block.threads.size()) continue;
    Thread& thread = block.threads[id];
    if (thread.ended || (thread.waits_at && !thread.met(thread.condition))) continue;
    resume(thread);
    any = true;
  }
  return any;
}

std::string place(const Block& block, unsigned thread) {
  return "block " + std::to_string(block.index.x) + ", thread " + std::to_string(thread);
}

[[noreturn]] void deadlock() {
  std::string text = "deadlock:";
  for (const Block& block : machine().cluster) {
    std::string last;
    for (const Thread& thread : block.threads) {
      const std::string doing =
          thread.ended ? " has ended" : std::string(" waits at ") + thread.waits_at;
      if (doing != last) text += "\n  " + place(block, thread.id) + doing;
      last = doing;
    }
  }
  throw Failure(text);
}

void run_cluster() {
  std::vector<Block>& cluster = machine().cluster;
  struct Place {
    unsigned block, warp;
  };
  std::vector<Place> places;
  for (unsigned b = 0; b < cluster.size(); ++b)
    for (unsigned w = 0; w < cluster[b].warps.size(); ++w) places.push_back({b, w});
  auto& random = chance();
  for (;;) {
    for (size_t i = places.size() - 1; i > 0; --i) std::swap(places[i], places[random() % (i + 1)]);
    bool any = false, all_ended = true;
    for (const Place& at : places) {
      // Either a few steps or as far as it gets: a warp may be far ahead of the others.
      unsigned steps = random() % 2 ? ~0u : 1 + random() % 16;
      while (steps-- && advance(cluster[at.block], at.warp)) any = true;
    }
    for (const Block& block : cluster)
      for (const Thread& thread : block.threads) all_ended &= thread.ended;
    if (all_ended) return;
    if (!any) deadlock();
  }
}

void set_up(Block& block, unsigned index, unsigned rank, const Launch& launch) {
  Machine& m = machine();
  block = Block();
  block.index = {index};
  block.rank = rank;
  block.dynamic = block.used = launch.shared;
  block.warps.resize((launch.threads + kLanes - 1) / kLanes);
  block.threads.resize(launch.threads);
  while (m.arenas.size() <= rank) m.arenas.emplace_back();
  block.shared = m.arenas[rank].memory;
  __asan_unpoison_memory_region(block.shared, kArena);
  if (m.garbage.empty()) m.garbage.resize(2 * kArena / sizeof(uint64_t));
  if (!m.garbage[0])
    for (uint64_t& word : m.garbage) word = m.chance();
  memcpy(block.shared, m.garbage.data() + m.chance() % (kArena / sizeof(uint64_t)), kArena);
  __asan_poison_memory_region(block.shared, kArena);
  __asan_unpoison_memory_region(block.shared, launch.shared);
  for (unsigned t = 0; t < launch.threads; ++t) {
    Thread& thread = block.threads[t];
    thread.block = &block;
    thread.id = t;
    if (m.stacks.empty()) m.stacks.push_back(std::make_unique<Stack>());
    thread.stack = std::move(m.stacks.back());
    m.stacks.pop_back();
    thread.stack->prepare(fiber);
  }
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& kernel) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_launch);
  m.launches.push_back(launch);
  m.kernel = &kernel;
  gridDim = dim3(launch.blocks);
  blockDim = dim3(launch.threads);
  struct Clear {  // stacks come back, also when a kernel failed
    Machine& m;
    ~Clear() {
      for (Block& block : m.cluster)
        for (Thread& thread : block.threads) m.stacks.push_back(std::move(thread.stack));
      m.cluster.clear();
    }
  };
  const unsigned clusters = launch.blocks / launch.cluster;
  const unsigned first = m.chance() % clusters;
  for (unsigned i = 0; i < clusters; ++i) {
    const Clear clear{m};
    m.cluster.resize(launch.cluster);
    const unsigned cluster = (first + i) % clusters;
    for (unsigned rank = 0; rank < launch.cluster; ++rank)
      set_up(m.cluster[rank], cluster * launch.cluster + rank, rank, launch);
    run_cluster();
  }
}

Thread& self() { return *machine().running; }
std::mt19937_64& chance() { return machine().chance; }
void seed(uint64_t value) {
  machine().chance.seed(value);
  machine().garbage.clear();
}
std::vector<Launch>& launches() { return machine().launches; }
Block& block_of_cluster(unsigned rank) { return machine().cluster.at(rank); }
unsigned cluster_size() { return machine().cluster.size(); }

void fail(const std::string& what) {
  const Thread& thread = self();
  throw Failure(place(*thread.block, thread.id) + ": " + what);
}

void wait(bool (*met)(const void*), const void* condition, const char* what) {
  Thread& thread = self();
  thread.met = met;
  thread.condition = condition;
  thread.waits_at = what;
  void* fake = nullptr;
  to_scheduler(&fake);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

int barrier(int name, unsigned threads, int brought, const char* what) {
  Barrier& barrier = self().block->barriers[name];
  const uint64_t round = barrier.rounds;
  barrier.sum += brought;
  if (++barrier.arrived == threads) {
    barrier.result = barrier.sum;
    barrier.sum = barrier.arrived = 0;
    ++barrier.rounds;
  } else {
    wait_until([&] { return barrier.rounds != round; }, what);
  }
  return barrier.result;
}

Meeting& join(uint32_t mask, const char* what, const void* in, void* out) {
  const Thread& thread = self();
  const unsigned lane = thread.id % kLanes;
  if (!(mask >> lane & 1)) fail(std::string(what) + " with a mask that leaves out its own lane");
  Meeting& meeting = thread.block->warps[thread.id / kLanes].meetings[__builtin_ctz(mask)];
  if (meeting.arrived &&
      (meeting.mask != mask || (meeting.what != what && strcmp(meeting.what, what) != 0)))
    fail(std::string(what) + " while other lanes of its warp are at " + meeting.what);
  meeting.what = what;
  meeting.mask = mask;
  meeting.arrived |= 1u << lane;
  meeting.in[lane] = in;
  meeting.out[lane] = out;
  return meeting;
}

void* shared_of_type(const void* key, size_t size, size_t alignment) {
  constexpr size_t kBetween = 64;  // poisoned
  Block& block = *self().block;
  const auto [at, fresh] = block.offsets.try_emplace(key, 0);
  if (fresh) {
    at->second = (block.used + kBetween + alignment - 1) / alignment * alignment;
    block.used = at->second + size;
    if (block.used > kSharedBytes)
      fail("shared memory of " + std::to_string(block.used) + " bytes");
    __asan_unpoison_memory_region(block.shared + at->second, size);
  }
  return block.shared + at->second;
}

SharedAddress address_of(const void* memory) {
  for (const Block& block : machine().cluster) {
    const ptrdiff_t offset = static_cast<const uint8_t*>(memory) - block.shared;
    if (offset >= 0 && offset < static_cast<ptrdiff_t>(kArena)) return block.rank << 24 | offset;
  }
  fail("an address that is not in shared memory");
}

uint8_t* memory_at(SharedAddress address) {
  const unsigned rank = address >> 24, offset = address & 0xffffff;
  if (rank >= machine().cluster.size() || offset >= kArena) fail("no shared memory is there");
  return machine().cluster[rank].shared + offset;
}

void multiply(const uint32_t (*a)[4], const uint32_t (*b)[2], int32_t (*sums)[4]) {
  int16_t left[16][32], right[8][32];
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, at = lane % 4 * 4;
    for (int byte = 0; byte < 4; ++byte) {
      for (int i = 0; i < 4; ++i)
        left[row + i % 2 * 8][at + i / 2 * 16 + byte] = static_cast<int8_t>(a[lane][i] >> 8 * byte);
      for (int i = 0; i < 2; ++i)
        right[row][at + i * 16 + byte] = static_cast<int8_t>(b[lane][i] >> 8 * byte);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += left[row][k] * right[column][k];
      if (__builtin_add_overflow(sums[lane][i], sum, &sums[lane][i])) fail("mma: int32 overflows");
    }
}

}  // namespace host

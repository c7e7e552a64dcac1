// A GPU on one thread of the host: the threads of a block are fibers, run in an order of chance.
//
// A fiber runs until it waits: for the lanes of a collective, at a barrier, or for a condition.
// Then another goes on, by a seed, so that what one warp may do before another does happen. The
// shared memory of a block starts as garbage and its surroundings are poisoned (AddressSanitizer).
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host {

using SharedAddress = uint32_t;  // rank of the block in its cluster << 24 | offset in its memory

constexpr unsigned kLanes = 32;
constexpr size_t kSharedBytes = 227 << 10;  // of a block on sm_90
constexpr size_t kArena = 256 << 10;

struct Failure : std::runtime_error {  // of the kernel: what a GPU would hang or err at
  using std::runtime_error::runtime_error;
};

struct Copy {  // a cp.async under way
  SharedAddress to;
  const void* from;
  int bytes;
  int size = 16;  // what is beyond `bytes` becomes zero
};

struct Meeting {  // lanes at a collective
  const char* what = nullptr;
  uint32_t mask = 0, arrived = 0;
  uint64_t rounds = 0;  // that are over
  const void* in[kLanes] = {};
  void* out[kLanes] = {};
};

struct Barrier {
  unsigned arrived = 0;
  uint64_t rounds = 0;
  int sum = 0, result = 0;  // of what the threads bring, in this round and in the last
};

struct Stack;
struct Block;

struct Thread {
  Block* block = nullptr;
  unsigned id = 0;
  bool ended = false;
  const char* waits_at = nullptr;  // nullptr: it can run
  bool (*met)(const void*) = nullptr;
  const void* condition = nullptr;
  std::unique_ptr<Stack> stack;
  std::vector<Copy> open;                // of no group yet
  std::deque<std::vector<Copy>> groups;  // oldest first
};

struct Warp {
  Meeting meetings[kLanes];  // by the lowest lane of the mask
};

struct Block {
  uint3 index;
  unsigned rank = 0;  // in the cluster
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<int, Barrier> barriers;
  uint8_t* shared = nullptr;  // dynamic first, then that of each type
  size_t dynamic = 0, used = 0;
  std::map<const void*, size_t> offsets;  // of each type
};

struct Launch {
  unsigned blocks, threads, cluster;
  size_t shared;
  int device;
  void* stream;
};

// Runs all blocks of a launch; throws Failure.
void run(const Launch& launch, const std::function<void()>& kernel);

Thread& self();
std::mt19937_64& chance();
void seed(uint64_t value);
std::vector<Launch>& launches();  // so far

// Block `rank` of the running cluster.
Block& block_of_cluster(unsigned rank);
unsigned cluster_size();

[[noreturn]] void fail(const std::string& what);  // names block and thread
void wait(bool (*met)(const void*), const void* condition, const char* what);

// Goes on when met() is true; other fibers run meanwhile.
template <class F>
void wait_until(const F& met, const char* what) {
  if (!met()) wait([](const void* f) { return (*static_cast<const F*>(f))(); }, &met, what);
}

// Lets others run.
inline void yield() {
  wait([](const void*) { return true; }, nullptr, "yield");
}

// Waits for `threads` threads of the block; the sum of what they bring.
int barrier(int name, unsigned threads, int brought, const char* what);

Meeting& join(uint32_t mask, const char* what, const void* in, void* out);

// All lanes of the mask meet; the last one computes together(in, out), arrays of pointers by lane.
template <class Out, class In, class F>
Out meet(uint32_t mask, const char* what, const In& in, const F& together) {
  Out out{};
  Meeting& meeting = join(mask, what, &in, &out);
  const uint64_t round = meeting.rounds;
  if (meeting.arrived == mask) {
    together(reinterpret_cast<const In* const*>(meeting.in),
             reinterpret_cast<Out* const*>(meeting.out));
    meeting.arrived = 0;
    ++meeting.rounds;
  } else {
    wait_until([&] { return meeting.rounds != round; }, what);
  }
  return out;
}

// Memory of the block for the type with this key.
void* shared_of_type(const void* key, size_t size, size_t alignment);
SharedAddress address_of(const void* memory);
uint8_t* memory_at(SharedAddress address);

// sums [32][4] += the products of fragments a [32][4] and b [32][2] of mma.m16n8k32.
void multiply(const uint32_t (*a)[4], const uint32_t (*b)[2], int32_t (*sums)[4]);

}  // namespace host

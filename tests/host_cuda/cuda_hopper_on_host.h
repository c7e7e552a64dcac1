// The instructions of csrc/cuda_hopper.cuh by their documented behaviour.
//
// What runs on its own does so as late, as early and in as many pieces as it may: the TMA's rows
// land when some thread waits, in an order of chance; a matrix product reads shared memory when it
// is committed or only when it is waited for, and until then its sums are garbage.
#pragma once
#include <array>
#include <utility>

#include "cuda.h"
#include "machine.h"

namespace host {

struct Mbarrier {  // in its eight bytes of shared memory
  static constexpr uint8_t kSign = 0x5b;
  int32_t bytes;  // that the phase still waits for; below zero if they came before their expect
  uint8_t arrivals, pending, parity, sign;
  void end_if_complete() {
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    parity ^= 1;
  }
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier has eight bytes");

struct Transfer {  // to the shared memory of one block
  struct Row {
    SharedAddress to;
    const uint8_t* from;
    int bytes;  // the rest of 128 become zero
  };
  SharedAddress barrier;
  std::vector<Row> rows;  // still to land
};

struct Products {  // of a warp, from the first that is issued to the wait for all
  struct Product {
    uint64_t a, b;
    bool accumulate;
  };
  bool fenced = false;
  int per_thread = 0;
  int32_t* sums[kLanes] = {};  // the threads' own, garbage meanwhile
  std::vector<int32_t> running;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;  // not run, oldest first
  int committed = 0;                        // groups, run or not, that have not been waited for
};

struct Cluster {
  std::vector<Transfer> transfers;
  std::map<std::pair<unsigned, unsigned>, Products> products;  // by block and warp
};

inline Cluster& cluster() {
  static Cluster* it = new Cluster;
  const bool fresh = block_of_cluster(0).barriers.try_emplace(-1).second;  // names are not negative
  if (fresh) {
    const bool left = !it->transfers.empty();
    *it = {};
    if (left) fail("the cluster before has left while the TMA wrote to its shared memory");
  }
  return *it;
}

inline Mbarrier& mbarrier(SharedAddress address) {
  if (address % 8) fail("an mbarrier is not aligned");
  bool alive = false;
  for (const Thread& thread : block_of_cluster(address >> 24).threads) alive |= !thread.ended;
  if (!alive) fail("an mbarrier of a block that has left");
  Mbarrier& barrier = *reinterpret_cast<Mbarrier*>(memory_at(address));
  if (barrier.sign != Mbarrier::kSign) fail("there is no mbarrier");
  return barrier;
}

inline void arrive(SharedAddress address, int32_t bytes) {
  Mbarrier& barrier = mbarrier(address);
  if (barrier.pending == 0) fail("more arrivals than the mbarrier waits for");
  barrier.bytes += bytes;
  --barrier.pending;
  barrier.end_if_complete();
}

// 16-byte parts trade places within eight rows of 128 bytes, by address.
inline SharedAddress swizzled(SharedAddress address) { return address ^ (address >> 7 & 7) << 4; }

// Some rows land, if any are under way.
inline bool fly() {
  std::vector<Transfer>& transfers = cluster().transfers;
  if (transfers.empty()) return false;
  auto& random = chance();
  std::swap(transfers[random() % transfers.size()], transfers.back());
  Transfer& transfer = transfers.back();
  size_t count = random() % 2 ? transfer.rows.size() : 1 + random() % transfer.rows.size();
  for (; count > 0; --count) {
    std::swap(transfer.rows[random() % transfer.rows.size()], transfer.rows.back());
    const Transfer::Row row = transfer.rows.back();
    transfer.rows.pop_back();
    Mbarrier& barrier = mbarrier(transfer.barrier);
    for (int at = 0; at < 128; at += 16) {
      uint8_t* to = memory_at(swizzled(row.to + at));
      const int bytes = min(16, max(0, row.bytes - at));
      if (bytes > 0) memcpy(to, row.from + at, bytes);
      memset(to + bytes, 0, 16 - bytes);
    }
    barrier.bytes -= 128;
    barrier.end_if_complete();
  }
  if (transfer.rows.empty()) transfers.pop_back();
  return true;
}

inline void transfer(SharedAddress to, const CUtensorMap& opaque, const int (&at)[3],
                     SharedAddress barrier) {
  TensorMap map;
  memcpy(&map, &opaque, sizeof map);
  if (!valid(map)) fail("there is no tensor map");
  if (to % 1024) fail("a swizzled box is not aligned to 1024 bytes");
  Transfer transfer{barrier, {}};
  for (uint32_t z = 0; z < map.box[2]; ++z)
    for (uint32_t y = 0; y < map.box[1]; ++y, to += 128) {
      const int64_t place[3] = {at[0], int64_t{at[1]} + y, int64_t{at[2]} + z};
      int64_t bytes = map.sizes[0] - place[0], offset = 0;
      for (int i = 0; i < 3; ++i) {
        if (place[i] < 0 || place[i] >= static_cast<int64_t>(map.sizes[i])) bytes = 0;
        offset += place[i] * static_cast<int64_t>(map.strides[i]);
      }
      const bool any = bytes > 0;
      transfer.rows.push_back({to, any ? map.tensor + offset : nullptr,
                               static_cast<int>(any ? min(bytes, int64_t{128}) : 0)});
    }
  cluster().transfers.push_back(std::move(transfer));
}

// Row r of an operand that a descriptor names: 32 bytes of k.
inline void read_row(uint64_t descriptor, int row, int8_t* out) {
  const SharedAddress begin = (descriptor & 0x3fff) << 4;
  const SharedAddress eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
    fail("a matrix product of operands without the 128-byte swizzle");
  const SharedAddress block = self().block->rank << 24;
  for (int at = 0; at < 32; at += 16) {
    const SharedAddress logical = begin + row / 8 * eight_rows + row % 8 * 128 + at;
    memcpy(out + at, memory_at(block | swizzled(logical)), 16);
  }
}

// Rows 16 w to 16 w + 15 of the product, w the warp in its group of four.
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) inline bool add_products(
    const int8_t (*a)[32], const int8_t (*b)[32], int columns, int32_t* running, int per_thread) {
  bool overflow = false;
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < columns; ++column) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[row][k] * b[column][k];
      const int lane = row % 8 * 4 + column % 8 / 2;
      int32_t& total = running[lane * per_thread + column / 8 * 4 + row / 8 * 2 + column % 2];
      overflow |= __builtin_add_overflow(total, sum, &total);
    }
  return overflow;
}

inline void run(Products& products, const Products::Product& product) {
  const int columns = 2 * products.per_thread, warp = self().id / kLanes % 4;
  int8_t a[16][32], b[256][32];
  for (int row = 0; row < 16; ++row) read_row(product.a, 16 * warp + row, a[row]);
  for (int column = 0; column < columns; ++column) read_row(product.b, column, b[column]);
  if (!product.accumulate) std::fill(products.running.begin(), products.running.end(), 0);
  if (add_products(a, b, columns, products.running.data(), products.per_thread))
    fail("wgmma: int32 overflows");
}

inline void run_groups(Products& products, size_t kept) {
  for (; products.groups.size() > kept; products.groups.pop_front())
    for (const Products::Product& product : products.groups.front()) run(products, product);
}

// All lanes of a warp at an instruction on the warp's products.
template <class In, class F>
void with_products(const char* what, const In& in, const F& together) {
  meet<int>(~0u, what, in, [&](auto given, auto) {
    const Thread& thread = self();
    together(cluster().products[{thread.block->rank, thread.id / kLanes}], given);
  });
}

}  // namespace host

namespace stf {

constexpr int32_t kRunning = 0x5eadbeef;  // in sums that products have not been waited for

inline uint32_t cluster_rank() { return host::self().block->rank; }

inline void cluster_sync() {
  host::Barrier& barrier = host::block_of_cluster(0).barriers[-2];
  const uint64_t round = barrier.rounds;
  if (++barrier.arrived == host::cluster_size() * blockDim.x) {
    barrier.arrived = 0;
    ++barrier.rounds;
  } else {
    host::wait_until([&] { return barrier.rounds != round; }, "cluster_sync");
  }
}

// A block may be later than its neighbour.
inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  while (host::chance()() % 8) host::yield();
  if (arrivals < 1 || arrivals > 255) host::fail("an mbarrier of so many arrivals");
  const auto count = static_cast<uint8_t>(arrivals);
  const host::Mbarrier fresh{0, count, count, 0, host::Mbarrier::kSign};
  memcpy(barrier, &fresh, sizeof fresh);
}

inline void barrier_init_fence() {}

inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  host::arrive(shared_address(barrier), static_cast<int32_t>(bytes));
}

inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  host::arrive((shared_address(barrier) & 0xffffff) | rank << 24, 0);
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  const host::Mbarrier& state = host::mbarrier(shared_address(barrier));
  while (state.parity == parity)
    host::wait_until([&] { return state.parity != parity || host::fly(); }, "barrier_wait");
}

inline void tma_prefetch(const CUtensorMap*) {}

inline void tma_multicast(void* shared, const CUtensorMap* map, int x, int y, int z, uint64_t* full,
                          uint16_t ranks) {
  for (unsigned rank = 0; rank < 16; ++rank)
    if (ranks >> rank & 1)
      host::transfer((shared_address(shared) & 0xffffff) | rank << 24, *map, {x, y, z},
                     (shared_address(full) & 0xffffff) | rank << 24);
}

inline void tma_load(void* shared, const CUtensorMap* map, int x, int y, int z, uint64_t* full) {
  tma_multicast(shared, map, x, y, z, full, static_cast<uint16_t>(1 << cluster_rank()));
}

template <int Count>
void registers_raise() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256, "setmaxnreg's limits");
  host::meet<int>(~0u, "setmaxnreg", 0, [](auto, auto) {});
}

template <int Count>
void registers_lower() {
  registers_raise<Count>();
}

inline void wgmma_fence() {
  host::with_products("wgmma_fence", 0, [](host::Products& p, auto) { p.fenced = true; });
}

inline void wgmma_commit() {
  host::with_products("wgmma_commit", 0, [](host::Products& p, auto) {
    p.groups.push_back(std::move(p.open));
    p.open.clear();
    ++p.committed;
    if (host::chance()() % 2) host::run_groups(p, 0);
  });
}

// Once in a while one warp's products take so long that all others run into it.
template <int Pending>
void wgmma_wait() {
  if (host::self().id % host::kLanes == 0 && host::chance()() % 8 == 0)
    while (host::chance()() % 64) host::yield();
  host::with_products("wgmma_wait", 0, [](host::Products& p, auto) {
    host::run_groups(p, Pending);
    p.committed = min(p.committed, Pending);
    if (p.committed > 0 || !p.open.empty() || p.running.empty()) return;
    for (unsigned lane = 0; lane < host::kLanes; ++lane)
      std::copy_n(p.running.begin() + lane * p.per_thread, p.per_thread, p.sums[lane]);
    p = {};
  });
}

template <int N>
void wgmma(int32_t (&sums)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  struct Given {
    int32_t* sums;
    uint64_t a, b;
    bool accumulate;
  };
  const Given given{sums, a, b, accumulate};
  host::with_products("wgmma", given, [](host::Products& p, auto in) {
    const bool first = p.running.empty();
    if (!p.fenced) host::fail("wgmma without wgmma_fence after other uses of its sums");
    if (first) {
      p.per_thread = N / 2;
      p.running.resize(host::kLanes * N / 2);
    }
    for (unsigned lane = 0; lane < host::kLanes; ++lane) {
      if (in[lane]->a != in[0]->a || in[lane]->b != in[0]->b ||
          in[lane]->accumulate != in[0]->accumulate)
        host::fail("wgmma of different operands in one warp");
      int32_t* const own = in[lane]->sums;
      if (first) {
        p.sums[lane] = own;
        std::copy_n(own, N / 2, p.running.begin() + lane * p.per_thread);
        std::fill_n(own, N / 2, kRunning);
      }
      if (p.sums[lane] != own || p.per_thread != N / 2 ||
          std::count(own, own + N / 2, kRunning) != N / 2)
        host::fail("the sums of running products were touched");
    }
    p.open.push_back({in[0]->a, in[0]->b, in[0]->accumulate});
  });
}

}  // namespace stf

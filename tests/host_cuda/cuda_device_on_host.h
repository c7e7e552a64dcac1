// The instructions of csrc/cuda_device.cuh by their documented behaviour.
#pragma once
#include <array>
#include <type_traits>

#include "machine.h"

namespace stf {

template <class T>
T& shared_memory() {
  static_assert(std::is_trivially_default_constructible_v<T>, "nobody constructs shared memory");
  static const char key = 0;
  return *static_cast<T*>(host::shared_of_type(&key, sizeof(T), alignof(T)));
}

inline uint8_t* dynamic_shared_memory() { return host::self().block->shared; }

inline SharedAddress shared_address(const void* memory) { return host::address_of(memory); }

inline void land(const host::Copy& copy) {
  uint8_t* to = host::memory_at(copy.to);
  memcpy(to, copy.from, copy.bytes);
  memset(to + copy.bytes, 0, copy.size - copy.bytes);
}

// By chance it lands at once, or only at the wait: both may happen.
inline void cp_async(SharedAddress to, const void* from, int bytes, int size) {
  if (to % size || reinterpret_cast<uintptr_t>(from) % size)
    host::fail("cp.async of " + std::to_string(size) + " bytes, unaligned");
  if (bytes < 0 || bytes > size) host::fail("cp.async of " + std::to_string(bytes) + " bytes");
  const host::Copy copy{to, from, bytes, size};
  if (host::chance()() % 2)
    land(copy);
  else
    host::self().open.push_back(copy);
}

inline void cp_async_16(SharedAddress to, const void* from, int bytes) {
  cp_async(to, from, bytes, 16);
}

inline void cp_async_8(SharedAddress to, const void* from, int bytes) {
  cp_async(to, from, bytes, 8);
}

inline void cp_async_commit() {
  host::Thread& thread = host::self();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int Groups>
void cp_async_wait() {
  auto& groups = host::self().groups;
  for (; groups.size() > Groups; groups.pop_front())
    for (const host::Copy& copy : groups.front()) land(copy);
}

inline void ldmatrix(uint32_t (&out)[4], SharedAddress row) {
  if (row % 16) host::fail("ldmatrix of an unaligned row");
  using Result = std::array<uint32_t, 4>;
  const Result result = host::meet<Result>(~0u, "ldmatrix", row, [](auto rows, auto results) {
    for (unsigned lane = 0; lane < host::kLanes; ++lane)
      for (unsigned i = 0; i < 4; ++i)
        memcpy(&(*results[lane])[i], host::memory_at(*rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
  });
  for (int i = 0; i < 4; ++i) out[i] = result[i];
}

inline void mma(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Given {
    uint32_t a[4], b[2];
    int32_t sums[4];
  };
  using Result = std::array<int32_t, 4>;
  Given given{{a[0], a[1], a[2], a[3]}, {b0, b1}, {sums[0], sums[1], sums[2], sums[3]}};
  const Result result = host::meet<Result>(~0u, "mma", given, [](auto in, auto out) {
    uint32_t a[32][4], b[32][2];
    int32_t sums[32][4];
    for (unsigned lane = 0; lane < host::kLanes; ++lane) {
      memcpy(a[lane], in[lane]->a, sizeof a[lane]);
      memcpy(b[lane], in[lane]->b, sizeof b[lane]);
      memcpy(sums[lane], in[lane]->sums, sizeof sums[lane]);
    }
    host::multiply(a, b, sums);
    for (unsigned lane = 0; lane < host::kLanes; ++lane)
      memcpy(out[lane]->data(), sums[lane], sizeof sums[lane]);
  });
  for (int i = 0; i < 4; ++i) sums[i] = result[i];
}

inline void named_barrier(int name, int threads) {
  if (name < 0 || name > 15 || threads % 32) host::fail("barrier of " + std::to_string(threads));
  host::barrier(name, threads, 0, "named_barrier");
}

}  // namespace stf

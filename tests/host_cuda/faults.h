// Kernels that do wrong where `fault` says so.
#pragma once
#include <cstdint>
#include <vector>

namespace host {

struct Faulty {
  const char* name;
  void (*kernel)(const int32_t* in, int32_t* out, bool fault);  // [768] each
};

const std::vector<Faulty>& faulty_kernels();
void run_faulty(const Faulty& faulty, const int32_t* in, int32_t* out, bool fault);

}  // namespace host

// A launch of a kernel on the emulated device.
#pragma once

#include "simt/language.h"

namespace simt {

struct Launch {
  const char* what;
  dim3 grid;
  unsigned threads;
  size_t shared;  // dynamic, bytes
  bool together;  // all blocks at once, with barriers among them
  void (*body)(const void* bound);
  const void* bound;  // what the body is called with
  size_t bound_bytes;
};

// runs every thread of the launch to its end; null, or what a device would refuse
const char* run(const Launch& launch);
int processors();

}  // namespace simt

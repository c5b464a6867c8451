// The texts of errors: where a thread is, and who waits for whom.
#pragma once

#include <cstdio>
#include <string>

#include "block.h"

namespace emulator {

inline std::string text_of(Location where) {
  std::string path = where.file;
  size_t slash = path.rfind('/');
  if (slash != std::string::npos && slash > 0) slash = path.rfind('/', slash - 1);  // the folder and the name
  return (slash == std::string::npos ? path : path.substr(slash + 1)) + ":" + std::to_string(where.line);
}

inline std::string text_of(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

inline std::string hexadecimal(unsigned mask) {
  char text[16];
  snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

inline std::string activity(const Thread& t) {
  switch (t.state) {
    case kLeft:
      return "left the kernel";
    case kMeeting:
      return std::string("wait in ") + t.name + " (" + text_of(t.where) + ", mask " + hexadecimal(t.mask) + ")";
    case kAtBarrier:
      return std::string("wait in ") + t.name + " (" + text_of(t.where) + ")";
    default:
      return "can run";
  }
}

// Nobody in the block can go on: who is where.
inline std::string stuck_text(const Block& b) {
  const bool barrier = b.at_barrier > 0;
  std::string text = barrier ? "divergent barrier" : "divergent warp collective";
  text += " in block " + text_of(b.index) + ":";
  const int count = b.size;
  for (int first = 0, end; first < count; first = end) {
    const std::string what = activity(b.threads[first]);
    for (end = first + 1; end < count && activity(b.threads[end]) == what;) ++end;
    text += (first > 0 ? "; threads " : " threads ") + std::to_string(first) + " to " + std::to_string(end - 1) + " " + what;
  }
  return text;
}

}  // namespace emulator

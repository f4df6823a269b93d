#include "host/blocks.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <stdexcept>

namespace vmemory::host {

namespace {

// "VEMBLCK" and the version of the format, a digit
constexpr uint64_t kMagic = 0x334b434c424d4556;
constexpr uint64_t kTag = 1024;

uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
  return hash ^ hash >> 29;
}

// four sums beside each other: one alone waits for its own multiplications
uint64_t checksum(const void* bytes, uint64_t size, uint64_t seed) {
  const char* at = static_cast<const char*>(bytes);
  uint64_t hash[4], word[4];
  for (uint64_t lane = 0; lane < 4; ++lane) hash[lane] = mixed(seed, lane);
  uint64_t i = 0;
  for (; i + sizeof word <= size; i += sizeof word) {
    std::memcpy(word, at + i, sizeof word);
    for (int lane = 0; lane < 4; ++lane) hash[lane] = mixed(hash[lane], word[lane]);
  }
  std::memset(word, 0, sizeof word);
  std::memcpy(word, at + i, size - i);
  for (int lane = 0; lane < 4; ++lane) seed = mixed(seed, mixed(hash[lane], word[lane]));
  return seed;
}

uint64_t sum(const BlockHeader& header, const void* payload) {
  return checksum(payload, header.size, checksum(&header, offsetof(BlockHeader, checksum), 0));
}

struct Page {
  uint64_t magic, payload, count, checksum;
  char tag[kTag];
};

uint64_t sum(const Page& page) { return checksum(page.tag, kTag, page.magic ^ page.payload ^ (page.count << 20)); }

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error(path + ": " + what);
}

}  // namespace

Blocks::Blocks(uint64_t budget, uint64_t payload, const std::string& path, const std::string& tag)
    : payload_(payload), stride_(stride(payload)), count_((budget - kPage) / stride_), bytes_(bytes(count_, payload)) {
  if (tag.size() >= kTag) throw std::invalid_argument("tag: expected less than 1024 bytes");
  try {
    open(path, tag);
    used_.assign(count_, 0);
  } catch (...) {
    close();
    throw;
  }
}

Blocks::~Blocks() { close(); }

void Blocks::close() {
  if (data_ != nullptr) {
    if (file_ >= 0) msync(data_, bytes_, MS_SYNC);
    munmap(data_, bytes_);
    data_ = nullptr;
  }
  if (file_ >= 0) {
    // a forked process that still has the file open would keep it locked
    flock(file_, LOCK_UN);
    ::close(file_);
  }
  file_ = -1;
}

void Blocks::open(const std::string& path, const std::string& tag) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  bool fresh = true;
  if (!path.empty()) {
    flags = MAP_SHARED;
    file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file_ < 0) fail(path, std::strerror(errno));
    struct stat facts;
    if (fstat(file_, &facts) != 0) fail(path, std::strerror(errno));
    if (!S_ISREG(facts.st_mode)) fail(path, "expected a regular file");
    if (flock(file_, LOCK_EX | LOCK_NB) != 0) fail(path, "another archive has this file open");
    // again: whoever made the file may have done so since
    if (fstat(file_, &facts) != 0) fail(path, std::strerror(errno));
    Page page{};
    if (facts.st_size > 0 && pread(file_, &page, sizeof page, 0) < 0) fail(path, std::strerror(errno));
    // a file killed before its first page was written holds nothing yet
    fresh = page.magic == 0;
    if (!fresh && page.magic << 8 == kMagic << 8 && page.magic != kMagic)
      fail(path, std::string("an archive of version ") + static_cast<char>(page.magic >> 56) +
                     ", this vmemory reads version " + static_cast<char>(kMagic >> 56));
    if (!fresh && (page.magic != kMagic || page.checksum != sum(page))) fail(path, "not an archive");
    if (!fresh && (page.payload != payload_ || std::strncmp(page.tag, tag.c_str(), kTag) != 0))
      fail(path, "expected the frames of " + tag + ", got those of " + std::string(page.tag));
    if (facts.st_size != 0 && static_cast<uint64_t>(facts.st_size) != bytes_)
      fail(path, "expected an archive of " + std::to_string(bytes_) + " bytes, got " + std::to_string(facts.st_size));
    if (facts.st_size == 0) {
      int failed;
      // space is taken at once: a full disk is an error here, and not a signal at some later write
      while ((failed = fallocate(file_, 0, 0, static_cast<off_t>(bytes_))) != 0 && errno == EINTR) {
      }
      if (failed != 0 && (errno != EOPNOTSUPP || ftruncate(file_, static_cast<off_t>(bytes_)) != 0)) {
        const std::string what = std::strerror(errno);
        unlink(path.c_str());
        fail(path, what);
      }
    }
  }
  void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, file_, 0);
  if (mapped == MAP_FAILED) fail(path, std::strerror(errno));
  data_ = static_cast<char*>(mapped);
  if (!fresh) return;
  Page made{kMagic, payload_, count_, 0, {}};
  std::memcpy(made.tag, tag.data(), tag.size());
  made.checksum = sum(made);
  std::memcpy(data_, &made, sizeof made);
}

std::optional<BlockHeader> Blocks::recover(uint64_t place) {
  if (file_ < 0) return std::nullopt;
  BlockHeader header;
  std::memcpy(&header, at(place), sizeof header);
  if (header.magic == kMagic && header.part < header.parts && header.parts <= count_ && header.size <= payload_ &&
      header.checksum == sum(header, at(place) + sizeof header)) {
    used_[place] = sizeof header + header.size;
    return header;
  }
  // the rest of a block that a killed process did not finish
  if (header.magic != 0 || header.sequence != 0) {
    used_[place] = stride_;
    wipe(place);
  }
  return std::nullopt;
}

char* Blocks::begin(uint64_t place, uint64_t sequence) {
  char* block = at(place);
  std::memset(block, 0, sizeof(BlockHeader));
  reinterpret_cast<BlockHeader*>(block)->sequence = sequence;
  std::atomic_signal_fence(std::memory_order_seq_cst);
  return block + sizeof(BlockHeader);
}

void Blocks::seal(uint64_t place, BlockHeader header) {
  char* payload = at(place) + sizeof header;
  const uint64_t used = sizeof header + header.size;
  // nothing of what lay here and was longer
  if (used_[place] > used) std::memset(at(place) + used, 0, used_[place] - used);
  used_[place] = used;
  header.magic = kMagic;
  header.checksum = sum(header, payload);
  // the header goes last: until then the block counts as torn, whatever the payload holds
  std::atomic_signal_fence(std::memory_order_seq_cst);
  std::memcpy(at(place), &header, sizeof header);
}

std::optional<uint64_t> Blocks::read(uint64_t place, uint64_t sequence, uint64_t part, char* out, uint64_t room) const {
  BlockHeader header;
  std::memcpy(&header, at(place), sizeof header);
  if (header.sequence != sequence || header.part != part || header.size > std::min(room, payload_) ||
      header.checksum != sum(header, at(place) + sizeof header))
    return std::nullopt;
  std::memcpy(out, at(place) + sizeof header, header.size);
  return header.size;
}

void Blocks::wipe(uint64_t place) {
  if (wiped(place)) return;
  // a kill in between leaves a block that does not match its header, to be wiped when the file is opened again
  std::memset(at(place) + sizeof(BlockHeader), 0, used_[place] - sizeof(BlockHeader));
  std::atomic_signal_fence(std::memory_order_seq_cst);
  std::memset(at(place), 0, sizeof(BlockHeader));
  used_[place] = 0;
}

void Blocks::sync() {
  if (file_ >= 0 && msync(data_, bytes_, MS_SYNC) != 0)
    throw std::runtime_error(std::string("archive: ") + std::strerror(errno));
}

}  // namespace vmemory::host

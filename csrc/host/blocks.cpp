#include "host/blocks.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
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

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }
[[noreturn]] void fail_by_errno() { fail(std::strerror(errno)); }

// a tag from a file, which may contain any bytes
std::string shown(const char* tag) {
  std::string text(tag, strnlen(tag, kTag));
  std::replace_if(text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

}  // namespace

Blocks::Blocks(uint64_t budget, uint64_t payload, const std::string& path, const std::string& tag)
    : payload_(payload), stride_(stride(payload)), count_((budget - kPage) / stride_), bytes_(bytes(count_, payload)) {
  if (tag.size() >= kTag) throw std::invalid_argument("tag: expected less than 1024 bytes");
  try {
    scratch_.resize(stride_);
    used_.assign(count_, 0);
    open(path, tag);
  } catch (...) {
    close();
    throw;
  }
}

Blocks::~Blocks() { close(); }

void Blocks::close() {
  if (data_ != nullptr) munmap(data_, bytes_);
  data_ = nullptr;
  if (file_ >= 0) {
    fdatasync(file_);
    // a forked process that still has the file open would keep it locked
    flock(file_, LOCK_UN);
    ::close(file_);
  }
  file_ = -1;
}

void Blocks::open(const std::string& path, const std::string& tag) {
  if (path.empty()) {
    void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) fail_by_errno();
    data_ = static_cast<char*>(mapped);
    return;
  }
  // non-blocking, because opening a pipe or device could wait forever
  file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0666);
  if (file_ < 0) fail_by_errno();
  struct stat facts;
  if (fstat(file_, &facts) != 0) fail_by_errno();
  if (!S_ISREG(facts.st_mode)) fail("expected a regular file");
  if (flock(file_, LOCK_EX | LOCK_NB) != 0) fail("another archive has this file open");
  // checked again, because another process may have created or removed the file since
  if (fstat(file_, &facts) != 0) fail_by_errno();
  if (facts.st_nlink == 0) fail("the file was removed while it was opened");
  const uint64_t size = static_cast<uint64_t>(facts.st_size);
  Page page{};
  if (size > 0) load(0, &page, std::min<uint64_t>(size, sizeof page));
  // a file killed before its first page was written holds nothing yet
  const char* bytes = reinterpret_cast<const char*>(&page);
  const bool fresh = std::all_of(bytes, bytes + sizeof page, [](char c) { return c == 0; });
  if (!fresh) {
    if (page.magic << 8 != kMagic << 8) fail("not an archive");
    if (page.magic != kMagic)
      fail("an archive of version " + std::string(1, shown(reinterpret_cast<char*>(&page.magic) + 7)[0]) +
           ", this vmemory reads version " + static_cast<char>(kMagic >> 56));
    if (page.checksum != sum(page)) fail("not an archive");
    if (page.payload != payload_ || std::strncmp(page.tag, tag.c_str(), kTag) != 0)
      fail("expected the frames of " + tag + ", got those of " + shown(page.tag));
  }
  if (size != 0 && size != bytes_)
    fail("expected an archive of " + std::to_string(bytes_) + " bytes, got " + std::to_string(size));
  int failed;
  // space is taken at once, for the holes of a sparse copy too: a full disk is an error here, not at some later write
  while ((failed = fallocate(file_, 0, 0, static_cast<off_t>(bytes_))) != 0 && errno == EINTR) {
  }
  if (failed != 0 && errno == EOPNOTSUPP) failed = size == 0 ? ftruncate(file_, static_cast<off_t>(bytes_)) : 0;
  if (failed != 0) {
    const std::string what = std::strerror(errno);
    if (size == 0) unlink(path.c_str());
    fail(what);
  }
  if (!fresh) return;
  Page made{kMagic, payload_, count_, 0, {}};
  std::memcpy(made.tag, tag.data(), tag.size());
  made.checksum = sum(made);
  store(0, &made, sizeof made);
}

void Blocks::load(uint64_t from, void* out, uint64_t n) const {
  if (data_ != nullptr) {
    std::memcpy(out, data_ + from, n);
    return;
  }
  for (char* to = static_cast<char*>(out); n > 0;) {
    const ssize_t got = pread(file_, to, n, static_cast<off_t>(from));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("archive: " + std::string(std::strerror(errno)));
    if (got == 0) fail("archive: the file was cut short while it was open");
    to += got;
    from += static_cast<uint64_t>(got);
    n -= static_cast<uint64_t>(got);
  }
}

void Blocks::store(uint64_t to, const void* bytes, uint64_t n) {
  if (data_ != nullptr) {
    std::memcpy(data_ + to, bytes, n);
    return;
  }
  for (const char* from = static_cast<const char*>(bytes); n > 0;) {
    const ssize_t put = pwrite(file_, from, n, static_cast<off_t>(to));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail("archive: " + std::string(std::strerror(errno)));
    from += put;
    to += static_cast<uint64_t>(put);
    n -= static_cast<uint64_t>(put);
  }
}

std::optional<BlockHeader> Blocks::sealed(uint64_t place) {
  if (data_ != nullptr) return std::nullopt;
  load(at(place), scratch_.data(), stride_);
  BlockHeader header;
  std::memcpy(&header, scratch_.data(), sizeof header);
  if (header.magic == kMagic && header.part < header.parts && header.parts <= count_ && header.size <= payload_ &&
      header.checksum == sum(header, draft())) {
    used_[place] = sizeof header + header.size;
    return header;
  }
  // the rest of a block that a killed process did not finish
  const bool zero = std::all_of(scratch_.begin(), scratch_.end(), [](char c) { return c == 0; });
  used_[place] = zero ? 0 : stride_;
  return std::nullopt;
}

void Blocks::seal(uint64_t place, BlockHeader header) {
  const uint64_t used = sizeof header + header.size, before = used_[place];
  // clear the rest of a longer previous payload
  if (before > used) std::memset(scratch_.data() + used, 0, before - used);
  header.magic = kMagic;
  header.checksum = sum(header, draft());
  std::memcpy(scratch_.data(), &header, sizeof header);
  used_[place] = std::max(used, before);
  store(at(place), scratch_.data(), used_[place]);
  used_[place] = used;
}

bool Blocks::read(uint64_t place, uint64_t sequence, uint64_t part, char* out, uint64_t size) const {
  BlockHeader header;
  load(at(place), &header, sizeof header);
  if (header.magic != kMagic || header.sequence != sequence || header.part != part || header.size != size) return false;
  load(at(place) + sizeof header, out, size);
  return header.checksum == sum(header, out);
}

void Blocks::wipe(uint64_t place) {
  if (wiped(place)) return;
  // a kill in between leaves a block that does not match its header, to be wiped when the file is opened again
  const std::vector<char> zeros(used_[place]);
  store(at(place) + sizeof(BlockHeader), zeros.data(), used_[place] - sizeof(BlockHeader));
  store(at(place), zeros.data(), sizeof(BlockHeader));
  used_[place] = 0;
}

void Blocks::check() const {
  if (file_ < 0) return;
  struct stat facts;
  if (fstat(file_, &facts) != 0) fail("archive: " + std::string(std::strerror(errno)));
  if (facts.st_nlink == 0) fail("archive: the file was removed while it was open");
  if (static_cast<uint64_t>(facts.st_size) < bytes_) fail("archive: the file was cut short while it was open");
}

void Blocks::sync() const {
  if (file_ < 0) return;
  check();
  if (fdatasync(file_) != 0) fail("archive: " + std::string(std::strerror(errno)));
}

}  // namespace vmemory::host

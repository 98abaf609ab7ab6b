// The threads of a block, or of the blocks of one cluster together, as fibers of one thread of the operating system: each
// runs to its next barrier. The order between barriers is varied, and the same every time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "poison.h"

namespace vtexport::emulator {

enum class Order { kForward, kBackward, kRandom };

// One block at a time, or the blocks of one cluster together: their threads, and their barriers. The threads of a
// cluster are numbered block by block. Static shared memory is one for all of them, so that the kernels of clusters
// must have none.
class Block {
 public:
  static constexpr unsigned kWarp = 32;

  void run(unsigned threads_each, unsigned blocks, size_t shared, Order order, std::mt19937& generator,
           const std::function<void()>& body) {
    const unsigned threads = threads_each * blocks;
    body_ = &body;
    each_ = threads_each;
    arrived_ = phase_ = 0;
    arrivals_.assign(threads, 0);
    shared_size_ = (shared + 127) / 128 * 128;
    shared_.reset(new (std::align_val_t(128)) unsigned char[shared_size_ * blocks + 1]);
    poison(shared_.get(), shared_size_ * blocks, generator());
    poison_static_shared(generator());
    waits_ = 0;
    fibers_.resize(threads);
    if (stacks_.size() < threads) stacks_.resize(threads);
    votes_.assign(threads, 0);
    for (unsigned t = 0; t < threads; ++t) {
      if (!stacks_[t]) stacks_[t] = std::make_unique<char[]>(kStack);
      Fiber& fiber = fibers_[t];
      fiber.state = State::kReady;
      fiber.begun = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_[t].get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    // Forward, all warps of all blocks advance together; backward, each warp and then each block runs as far as it can
    // alone; at random, either.
    auto alone = [&] { return order == Order::kBackward || (order == Order::kRandom && generator() % 2 == 0); };
    auto numbers = [&](unsigned count) {
      std::vector<unsigned> found(count);
      for (unsigned i = 0; i < count; ++i) found[i] = order == Order::kBackward ? count - 1 - i : i;
      return found;
    };
    auto in_block = numbers(blocks), warps = numbers((threads_each + kWarp - 1) / kWarp), lanes = numbers(kWarp);
    auto mix = [&](std::vector<unsigned>& all) {
      if (order == Order::kRandom) std::shuffle(all.begin(), all.end(), generator);
    };
    do {
      mix(in_block);
      for (unsigned b : in_block) {
        do {
          mix(warps);
          for (unsigned w : warps) {
            do {
              mix(lanes);
              for (unsigned l : lanes) {
                if (w * kWarp + l >= threads_each) continue;
                const unsigned t = b * threads_each + w * kWarp + l;
                if (fibers_[t].state != State::kReady) continue;
                current_ = t;
                resume(fibers_[t]);
              }
            } while (alone() && release_warp(b * threads_each / kWarp + w));
          }
        } while (alone() && release_block(b * threads_each));
      }
    } while (release());
  }

  unsigned thread() const { return current_ % each_; }
  unsigned rank() const { return current_ / each_; }
  // A number that no other thread of the cluster has.
  unsigned thread_of_cluster() const { return current_; }
  unsigned char* shared() { return shared_.get() + rank() * shared_size_; }
  // Where block `rank` of the cluster has what this one has at `own`. A block that has ended has no memory.
  const void* shared_of(unsigned rank, const void* own) const {
    const auto first = fibers_.begin() + rank * each_;
    if (std::all_of(first, first + each_, [](const Fiber& fiber) { return fiber.state == State::kDone; })) {
      std::fprintf(stderr, "block %u of the cluster has ended, and block %u reads its memory\n", rank, this->rank());
      std::abort();
    }
    return static_cast<const unsigned char*>(own) + (static_cast<ptrdiff_t>(rank) - this->rank()) * shared_size_;
  }

  // The two halves of the cluster's barrier.
  void arrive() {
    arrivals_[current_] = phase_;
    if (++arrived_ < fibers_.size()) return;
    arrived_ = 0;
    ++phase_;
    for (Fiber& fiber : fibers_) {
      if (fiber.state == State::kAtCluster) fiber.state = State::kReady;
    }
  }
  void wait_for_cluster() {
    if (phase_ == arrivals_[current_]) stop(State::kAtCluster);
  }

  void wait(bool whole_block) { stop(whole_block ? State::kAtBlock : State::kAtWarp); }
  // Where lanes exchange words. That orders no memory on a GPU.
  void meet() { stop(State::kAtWarp); }

  // How many threads have waited for the launch before theirs.
  void waited_for_previous() { ++waits_; }
  unsigned waits() const { return waits_; }

  // The word of every thread, as the warp or the block exchanges it.
  template <typename T>
  void say(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    votes_[current_] = bits;
  }
  template <typename T>
  T heard(unsigned thread) const {
    T value;
    std::memcpy(&value, &votes_[rank() * each_ + thread], sizeof value);
    return value;
  }
  unsigned threads() const { return each_; }

 private:
  enum class State { kReady, kAtWarp, kAtBlock, kAtCluster, kDone };
  // A context only begins a fiber: switching by it each time would be a system call each time.
  struct Fiber {
    ucontext_t context;
    void* place[5];
    bool begun;
    State state;
  };
  static constexpr size_t kStack = 64 * 1024;

  // No frame is ever left by these jumps, so that AddressSanitizer need not hear of them, which takes it long.
  __attribute__((noinline, no_sanitize_address)) void stop(State state) {
    Fiber& own = fibers_[current_];
    own.state = state;
    own.begun = true;
    if (__builtin_setjmp(own.place) == 0) __builtin_longjmp(home_place_, 1);
  }

  __attribute__((noinline, no_sanitize_address)) void resume(Fiber& fiber) {
    if (__builtin_setjmp(home_place_) != 0) return;
    if (fiber.begun) __builtin_longjmp(fiber.place, 1);
    setcontext(&fiber.context);
  }

  __attribute__((no_sanitize_address)) static void enter();

  // Opens the barrier of a warp that all its threads have reached.
  bool release_warp(unsigned warp) {
    const unsigned first = warp * kWarp, end = std::min<unsigned>(first + kWarp, fibers_.size());
    for (unsigned t = first; t < end; ++t) {
      if (fibers_[t].state != State::kAtWarp) return false;
    }
    for (unsigned t = first; t < end; ++t) fibers_[t].state = State::kReady;
    return true;
  }

  // Opens the barrier of the block that begins with fiber `first`, if all its threads have reached it.
  bool release_block(unsigned first) {
    for (unsigned t = first; t < first + each_; ++t) {
      if (fibers_[t].state != State::kAtBlock) return false;
    }
    for (unsigned t = first; t < first + each_; ++t) fibers_[t].state = State::kReady;
    return true;
  }

  // Opens every barrier that all threads have reached; false when all threads are done.
  bool release() {
    unsigned done = 0, at_block = 0;
    bool opened = false;
    for (const Fiber& fiber : fibers_) {
      done += fiber.state == State::kDone;
      at_block += fiber.state == State::kAtBlock;
      opened |= fiber.state == State::kReady;
    }
    if (done == fibers_.size()) return false;
    for (unsigned warp = 0; warp * kWarp < fibers_.size(); ++warp) opened |= release_warp(warp);
    for (unsigned first = 0; first < fibers_.size(); first += each_) opened |= release_block(first);
    if (!opened) {
      std::fprintf(stderr, "a barrier that not all threads reach: %u of %zu wait at the block's, %u are done\n", at_block,
                   fibers_.size(), done);
      std::abort();
    }
    return true;
  }

  struct Free {
    void operator()(unsigned char* memory) const { operator delete[](memory, std::align_val_t(128)); }
  };

  const std::function<void()>* body_ = nullptr;
  std::unique_ptr<unsigned char[], Free> shared_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<Fiber> fibers_;
  std::vector<uint64_t> votes_;
  std::vector<unsigned> arrivals_;  // the phase of the cluster's barrier in which each thread arrived last
  void* home_place_[5];
  size_t shared_size_ = 0;
  unsigned current_ = 0, each_ = 1, arrived_ = 0, phase_ = 0, waits_ = 0;
};

inline Block block;

inline void Block::enter() {
  (*block.body_)();
  block.fibers_[block.current_].state = State::kDone;
  __builtin_longjmp(block.home_place_, 1);
}

}  // namespace vtexport::emulator

// The threads that compute something together in one parallel region, with barriers of their own between its parts: to begin
// and end a region for each part would take longer than many parts of a decode step do.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include <omp.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

class Team {
  public:
    // What the threads of a team share. Each thread's tasks of every second part are counted in the same place.
    struct Board {
        struct alignas(64) Counter {
            std::atomic<int64_t> taken[2] = {0, 0};
        };
        explicit Board(int64_t threads) : counters(threads) {}
        std::vector<Counter> counters;
        alignas(64) std::atomic<int64_t> arrived{0};
        alignas(64) std::atomic<int64_t> part{0};
    };

    Team(Board& board, int64_t threads, int64_t thread) : board_(board), threads_(threads), thread_(thread) {}

    int64_t threads() const { return threads_; }
    // Returns the first task of this thread's own in a part of `count` tasks.
    int64_t first_of(int64_t count) const { return count * thread_ / threads_; }

    // Calls f(first, end) for ranges that together are the tasks 0 to count - 1, and waits until all are done. Each thread has
    // consecutive tasks, since memory is read fastest in order. Having done its own it takes over those of others, which may
    // have lost their cores to other processes.
    template <typename F>
    void each(int64_t count, F f) {
        const int64_t part = board_.part.load(std::memory_order_relaxed);
        const int64_t step = std::max<int64_t>(1, count / (8 * threads_));
        for (int64_t i = 0; i < threads_; ++i) {
            const int64_t owner = (thread_ + i) % threads_, end = count * (owner + 1) / threads_;
            std::atomic<int64_t>& taken = board_.counters[owner].taken[part % 2];
            for (int64_t at; (at = count * owner / threads_ + taken.fetch_add(step, std::memory_order_relaxed)) < end;)
                f(at, std::min(end, at + step));
        }
        board_.counters[thread_].taken[(part + 1) % 2].store(0, std::memory_order_relaxed);  // for the next part
        wait(part);
    }

    // Has this thread fetch `bytes` from `from` on, which it reads soon, into its L2 cache whenever it waits for the others:
    // memory is idle then.
    void fetch_while_waiting(const char* from, int64_t bytes) { fetched_ = from, fetch_end_ = from + bytes; }

  private:
    // Waits until all threads have done the part. A thread that waits longer than it has to if all run lets other processes
    // use its core.
    void wait(int64_t part) {
        constexpr int64_t PAUSES = 1000;  // tens of microseconds
        if (board_.arrived.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            board_.arrived.store(0, std::memory_order_relaxed);
            board_.part.store(part + 1, std::memory_order_release);
            return;
        }
        for (int64_t waited = 0; board_.part.load(std::memory_order_acquire) == part; ++waited)
            if (fetched_ < fetch_end_)
                fetch();
            else if (waited < PAUSES)
                pause();
            else
                std::this_thread::yield();
    }

    void fetch() {
        constexpr int64_t LINE = 64, LINES = 4;  // so few at a time that the end of the wait is seen at once
        for (const char* end = fetched_ + LINES * LINE; fetched_ < end; fetched_ += LINE) __builtin_prefetch(fetched_, 0, 2);
    }

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    Board& board_;
    const int64_t threads_, thread_;
    const char *fetched_ = nullptr, *fetch_end_ = nullptr;
};

// Calls f(team) on each of `threads` threads, of PyTorch's own OpenMP library.
template <typename F>
void with_team(int64_t threads, F f) {
    Team::Board board(threads);
    if (threads == 1) {
        Team alone(board, 1, 0);
        f(alone);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        Team team(board, omp_get_num_threads(), omp_get_thread_num());
        f(team);
    }
}

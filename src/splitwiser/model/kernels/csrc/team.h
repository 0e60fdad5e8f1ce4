// The threads that compute something together in one parallel region, with barriers of their own between its parts: to begin
// and end a region for each part would take longer than many parts of a decode step do.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include <omp.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

class Team {
  public:
    // What the threads of a team share.
    struct Board {
        alignas(64) std::atomic<int64_t> next{0};  // the first task that no thread has taken
        alignas(64) std::atomic<int64_t> arrived{0};
        alignas(64) std::atomic<int64_t> round{0};
    };

    Team(Board& board, int64_t threads) : board_(board), threads_(threads) {}

    int64_t threads() const { return threads_; }

    // Calls f(first, end) for ranges that together are the tasks 0 to count - 1, and waits until all are done. A thread takes
    // a few tasks at a time, so one that has lost its core to another process is given less to do.
    template <typename F>
    void each(int64_t count, F f) {
        const int64_t step = std::max<int64_t>(1, count / (8 * threads_));
        for (int64_t first; (first = board_.next.fetch_add(step, std::memory_order_relaxed)) < count;)
            f(first, std::min(count, first + step));
        wait();
    }

  private:
    // Waits until all threads have come here. A thread that waits longer than the others need if all run lets other processes
    // use its core.
    void wait() {
        constexpr int64_t PAUSES = 1000;  // tens of microseconds
        const int64_t round = board_.round.load(std::memory_order_relaxed);
        if (board_.arrived.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            board_.arrived.store(0, std::memory_order_relaxed);
            board_.next.store(0, std::memory_order_relaxed);
            board_.round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int64_t waited = 0; board_.round.load(std::memory_order_acquire) == round; ++waited)
            if (waited < PAUSES)
                pause();
            else
                std::this_thread::yield();
    }

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    Board& board_;
    const int64_t threads_;
};

// Calls f(team) on each of `threads` threads, of PyTorch's own OpenMP library.
template <typename F>
void with_team(int64_t threads, F f) {
    Team::Board board;
    if (threads == 1) {
        Team alone(board, 1);
        f(alone);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        Team team(board, omp_get_num_threads());
        f(team);
    }
}

// The threads that share one call's work. Not a scheduler: one job at a time, from one caller.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace longspan {

// Splits tasks 0..n-1 over the caller and its workers. Every thread has a contiguous range of its
// own, so that neighbouring weights are read by one core, and takes from the others' when it is
// done. The caller never waits for a worker that has not begun: where cores are short it simply
// does all the work itself. Idle workers look for work for a few dozen microseconds, the gap
// between two calls of a step, then sleep; several processes on the same cores do not starve one
// another. While a `Run` lives they look longer. Within a task the pool is that task's thread alone.
class Pool {
  public:
    // Throws std::runtime_error if the system does not start so many.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return inside_ ? 1 : threads_; }
    // Worker t keeps to core cores[t] from now on; cores[0] is the caller's.
    void keep_to(const std::vector<int>& cores);
    // Of n tasks a thread begins with [first(n, thread), first(n, thread + 1)).
    int first(int n, int thread) const {
        return static_cast<int>(static_cast<int64_t>(thread) * n / threads());
    }
    // The thread that begins with task i of n.
    int owner(int n, int i) const {
        return static_cast<int>((static_cast<int64_t>(i + 1) * threads() - 1) / n);
    }

    // Calls task(i) for all i in [0, n), on any thread, in any order. Rethrows what a task threw.
    // From two callers at once, the second computes on its own thread.
    template <class Task>
    void run(int n, const Task& task) {
        if (n <= 1 || threads() == 1 || !busy_.try_lock()) {
            for (int i = 0; i < n; ++i) task(i);
            return;
        }
        const std::lock_guard<std::mutex> hold(busy_, std::adopt_lock);
        call_ = [](const void* self, int i) { (*static_cast<const Task*>(self))(i); };
        task_ = &task;
        share(n);
    }

    // A run of jobs that follow one another within microseconds. Should another process take the
    // caller's core for a moment, workers that slept would have to be woken up again.
    class Run {
      public:
        explicit Run(Pool& pool) : pool_(pool) { pool_.runs_.fetch_add(1); }
        ~Run() { pool_.runs_.fetch_sub(1); }
        Run(const Run&) = delete;
        Run& operator=(const Run&) = delete;

      private:
        Pool& pool_;
    };

  private:
    struct alignas(64) Range {
        std::atomic<int> next{0};
        int stop = 0;
    };

    void end();
    void share(int n);
    void work(int thread);
    void drain(int thread);

    inline static thread_local bool inside_ = false;  // a task

    const int threads_;
    std::mutex busy_;
    void (*call_)(const void*, int) = nullptr;
    const void* task_ = nullptr;
    std::unique_ptr<Range[]> ranges_;
    std::mutex failing_;
    std::exception_ptr failed_;

    // Low half: workers inside the job, and whether it may be entered. `job_` wakes sleepers.
    alignas(64) std::atomic<uint32_t> gate_{0};
    alignas(64) std::atomic<int> job_{0};
    std::atomic<int> runs_{0};
    std::atomic<bool> ending_{false};
    std::vector<std::thread> workers_;
};

// The process's pool; `use_threads` replaces it while no call is running.
Pool& pool();
void use_threads(int threads);

}  // namespace longspan

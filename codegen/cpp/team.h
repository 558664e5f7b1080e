// The threads that run an artifact's kernels together, what each of them computes, and where they wait for each other.
//
// A team of one starts no thread and touches nothing that is shared. Threads that wait look at one number, which is cheap
// as long as all of them run; where the system gives a processor to somebody else meanwhile, they let go of theirs.

#include <atomic>
#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

struct Range {
    int64_t first, last;
};

// Where a team meets: how many have come, and how often all of them have.
struct Meeting {
    alignas(64) std::atomic<int64_t> arrived{0};
    alignas(64) std::atomic<int64_t> rounds{0};
};

// How often a thread looks before it lets others run: some tens of microseconds, longer than the shares of a step differ.
constexpr int LOOKS = 1 << 11;

static inline void look_again(int looks) {
#if defined(__unix__) || defined(__APPLE__)
    if (looks >= LOOKS) {
        sched_yield();
        return;
    }
#endif
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
}

// What a kernel of several threads may hand around: parts of a sum that is put together in a fixed order.
constexpr int64_t SHARED_BYTES = 1 << 18;

// The threads that run a kernel together; each calls it with its own number.
struct Team {
    int64_t thread, threads;
    // Memory that all of them see, of SHARED_BYTES; none in a team of one. A kernel waits before it writes there, since the
    // step before it may still run, and behind its last reading.
    void* shared = nullptr;
    Meeting* meeting = nullptr;

    // This thread's share of `count` outputs.
    Range share(int64_t count) const { return {count * thread / threads, count * (thread + 1) / threads}; }

    // Until every thread is here: what each wrote before is then seen by all.
    void wait() const {
        if (threads > 1) meet();
    }

  private:
    void meet() const {
        const int64_t round = meeting->rounds.load(std::memory_order_relaxed);
        if (meeting->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            meeting->arrived.store(0, std::memory_order_relaxed);
            meeting->rounds.store(round + 1, std::memory_order_release);
            return;
        }
        for (int looks = 0; meeting->rounds.load(std::memory_order_acquire) == round; looks++) look_again(looks);
    }
};

// Call `steps` on every thread of a team with what is `given`; one thread starts no pool.
template <class Given>
static void run(int64_t threads, void (*steps)(const Team&, Given), Given given) {
#if defined(_OPENMP)
    if (threads > 1) {
        Meeting meeting;
        alignas(64) char shared[SHARED_BYTES];
#pragma omp parallel num_threads(static_cast<int>(threads))
        steps(Team{omp_get_thread_num(), omp_get_num_threads(), shared, &meeting}, given);
        return;
    }
#endif
    steps(Team{0, 1}, given);
}

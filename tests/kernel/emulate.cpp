// Runs src/sys/cuda/crc64.cu on the CPU: a simulated GPU of one multiprocessor, for tests/kernel.rs.
//
//   emulate SEED < cases > sums
//
// A case is four little-endian u64 (place, bytes, chunk_bytes, blocks) and `bytes` bytes; the answer to it is one
// little-endian u64 for each block, FILLER where the kernel wrote nothing. place 0..4095 puts the data that many bytes
// after a page that cannot be touched, place 4096 ends it where such a page begins: a read outside the data kills the
// process on one side or the other.
//
// Each thread of a block is a fiber that runs until its next barrier. In each phase the fibers run in another order,
// drawn from the seed, so that a missing barrier shows as a wrong sum. A barrier that some threads reach and some do not
// ends the process.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __constant__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
    unsigned int x;
};
static Index threadIdx, blockIdx;
static void __syncthreads();

#include "crc64.cu"

static const unsigned THREADS = 128;
static const size_t STACK_BYTES = 64 * 1024;
static const uint64_t FILLER = 0x5555555555555555;

enum class At { Running, Barrier, End };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    At at;
};
static std::vector<Fiber> fibers(THREADS);
static ucontext_t scheduler;
static struct {
    const unsigned char* data;
    u64 bytes, chunk_bytes;
    u64* sums;
} call;

[[noreturn]] static void die(const char* what) {
    fprintf(stderr, "emulate: %s\n", what);
    _exit(1);
}

static void __syncthreads() {
    const unsigned thread = threadIdx.x;
    fibers[thread].at = At::Barrier;
    swapcontext(&fibers[thread].context, &scheduler);
}

static void thread_main() {
    lodestream_crc64_chunks(call.data, call.bytes, call.chunk_bytes, call.sums);
    fibers[threadIdx.x].at = At::End;
}

static void run_block(unsigned block, std::mt19937_64& random) {
    blockIdx.x = block;
    std::vector<unsigned> order;
    for (unsigned thread = 0; thread < THREADS; ++thread) {
        order.push_back(thread);
        Fiber& fiber = fibers[thread];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, thread_main, 0);
    }
    for (;;) {
        std::shuffle(order.begin(), order.end(), random);
        unsigned ended = 0;
        for (unsigned thread : order) {
            threadIdx.x = thread;
            fibers[thread].at = At::Running;
            swapcontext(&scheduler, &fibers[thread].context);
            ended += fibers[thread].at == At::End;
        }
        if (ended == THREADS) return;
        if (ended != 0) die("some threads of a block wait at a barrier that others have not reached");
    }
}

static bool read_all(void* into, size_t bytes) { return fread(into, 1, bytes, stdin) == bytes; }

int main(int argc, char** argv) {
    if (argc != 2) die("usage: emulate SEED");
    std::mt19937_64 random(strtoull(argv[1], nullptr, 10));
    const size_t page = 4096;
    uint64_t head[4];
    while (read_all(head, sizeof head)) {
        const uint64_t place = head[0], bytes = head[1], chunk_bytes = head[2], blocks = head[3];
        const size_t inner = ((bytes + page - 1) / page + 1) * page;
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
        char* const area = (char*)mmap(nullptr, inner + 2 * page, PROT_NONE, flags, -1, 0);
        if (area == MAP_FAILED) die("no memory");
        if (mprotect(area + page, inner, PROT_READ | PROT_WRITE) != 0) die("no memory");
        // What lies around the data is not zero, so that it would show in a sum.
        memset(area + page, 0xa5, inner);
        char* const data = place < page ? area + page + place : area + page + inner - bytes;
        if (!read_all(data, bytes)) die("a case is cut off");
        std::vector<uint64_t> sums(blocks, FILLER);
        call = {(const unsigned char*)data, bytes, chunk_bytes, (u64*)sums.data()};
        for (uint64_t block = 0; block < blocks; ++block) run_block(block, random);
        if (fwrite(sums.data(), 8, blocks, stdout) != blocks) die("cannot answer");
        munmap(area, inner + 2 * page);
    }
    return fflush(stdout) == 0 ? 0 : 1;
}

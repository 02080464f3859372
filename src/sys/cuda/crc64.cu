// CRC-64/NVME of each chunk of a range of GPU memory. Why it is done this way: docs/decisions/0008-checksum-kernel.md.
//
// The launch contract of `lodestream_crc64_chunks(data, bytes, chunk_bytes, sums)`:
//   grid    (chunks, 1, 1) where chunks = ceil(bytes / chunk_bytes), at least 1; a block past the last chunk does nothing
//   block   (128, 1, 1), exactly
//   shared  no dynamic shared memory; 33 280 bytes of static shared memory a block
//   data    device address of `bytes` bytes, of any alignment; nobody writes to them while the kernel runs
//   sums    device address of `chunks` 64-bit places, 8-byte aligned: place i receives the checksum of the bytes from
//           i * chunk_bytes, chunk_bytes of them or what is left for the last; every place is written
// chunk_bytes is not zero. Nothing outside `data` is read and nothing outside `sums` is written. Neither `bytes` nor
// `chunk_bytes` has to be a multiple of anything; whole multiples of 32 KiB from an aligned address waste no lane.
//
// The file is compiled by scripts/kernels into crc64.ptx, which is checked in, and by tests/kernel.rs as C++ for the CPU.
// It includes nothing, so that both can.
//
// How it works. A checksum is the remainder of the message, a polynomial over GF(2), by the generator P of degree 64. A
// GPU has no carry-less multiplication, but squaring is linear over GF(2): P(x)^2 = P(x^2), hence P(x)^(2^k) = P(x^(2^k)).
// So P divides P(z) for every z = x^(2^k), and a message may be divided by P(z) first: what is left has the same
// remainder by P. With z = x^(32 * 128) the message is a table of rows of 128 words of 32 bits, and the division by P(z)
// never mixes two columns or two bits of a word: each thread divides its own column, 32 bits at a time, with nothing but
// exclusive or, the 32 lower terms of P saying which of the 64 rows before take part. No tables, no shifts, and each row
// of a warp is one full line of memory.
//
// The 64 rows of remainder, laid out as they are, are a message again, of 128 rows of half as many columns: z becomes
// its square root and the same division leaves half as much, until one column of 64 words is left. 64 threads multiply
// those by their powers of x, and the sum is the checksum.

typedef unsigned int u32;
typedef unsigned long long u64;

// The generator without its x^64; bit e is the coefficient of x^e.
#define GENERATOR 0xad93d23594c93659ull
// The same in the order of the checksum itself: bit 63 - e is the coefficient of x^e.
#define GENERATOR_REFLECTED 0x9a6c9329ac4bc9b5ull
// Rows of a remainder: the degree of the generator.
#define ROWS 64
// Columns of the message: threads of a block. A power of two, or P would not divide P(z).
#define COLUMNS 128
// Rows whose loads are under way while a thread divides: 128 bytes a row and warp.
#define ROWS_AHEAD 16

// The next state of a checksum (or of any element, in reflected order): times x.
__device__ constexpr u64 times_x(u64 value) {
    return (value >> 1) ^ (value & 1 ? GENERATOR_REFLECTED : 0);
}

// What the words of the last column are multiplied by: word i has 63 - i words behind it, and lies, in the low half of
// a 64-bit element, 32 places too low for the x^64 that a checksum is multiplied by. So x^(32 * (64 - i)).
struct Powers {
    u64 of[ROWS];
    __device__ constexpr Powers() : of() {
        u64 power = 1ull << 63;
        for (int i = ROWS - 1; i >= 0; --i) {
            for (int bit = 0; bit < 32; ++bit) power = times_x(power);
            of[i] = power;
        }
    }
};
__constant__ constexpr Powers POWERS;

// The product of two elements in reflected order.
__device__ u64 product(u64 a, u64 b) {
    u64 sum = 0;
    for (int e = 0; e < 64; ++e) {
        if (a >> (63 - e) & 1) sum ^= b;
        b = times_x(b);
    }
    return sum;
}

// The state of a checksum after `count` more bytes: for the few that no whole word holds.
__device__ u64 after_bytes(u64 state, const unsigned char* bytes, u64 count) {
    for (u64 i = 0; i < count; ++i) {
        state ^= bytes[i];
        for (int bit = 0; bit < 8; ++bit) state = times_x(state);
    }
    return state;
}

// 64 rows of one column, divided by P(z). Row k of the quotient is row k of the message plus those rows k - 64 + e of the
// quotient for which P has the term x^e; slot k % 64 of the window holds the newest of them. FROM and UNTIL bound
// row + e, and so say which rows of the quotient there are: those before these 64 rows lie below 64, those among them not.
//   <64, 128>  the first rows of a message: none before them
//   < 0, 128>  rows in between
//   < 0,  64>  the last rows of a message: they are the remainder, and no part of the quotient
// e ascends so that the newest row, which the next step waits for, is added last. Every index is known to the compiler,
// or the window would not lie in registers.
template <int FROM, int UNTIL, class Words>
__device__ __forceinline__ void divide(u32 (&window)[ROWS], Words& words) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        u32 word = words.take(row);
#pragma unroll
        for (int e = 0; e < 64; ++e) {
            if ((GENERATOR >> e & 1) && row + e >= FROM && row + e < UNTIL) word ^= window[(row + e) % ROWS];
        }
        window[row] = word;
    }
}

// Rows that lie in the window already.
struct Held {
    u32 (&window)[ROWS];
    __device__ __forceinline__ u32 take(int row) { return window[row]; }
};

// Rows in the image of a remainder, as so many columns.
struct Image {
    const u32* column;
    u32 columns;
    __device__ __forceinline__ u32 take(int row) { return column[row * columns]; }
};

// Rows in GPU memory, loaded ROWS_AHEAD rows before they are taken; LAST is the 64 rows that nothing follows.
template <bool LAST>
struct Stream {
    const u32* column;
    u32 (&ahead)[ROWS_AHEAD];
    __device__ __forceinline__ u32 take(int row) {
        u32 word = ahead[row % ROWS_AHEAD];
        if (!LAST || row + ROWS_AHEAD < ROWS) ahead[row % ROWS_AHEAD] = column[(row + ROWS_AHEAD) * COLUMNS];
        return word;
    }
};

// At most 128 registers a thread: four blocks, or 16 warps, on a multiprocessor of 65 536 registers.
extern "C" __global__ void __launch_bounds__(COLUMNS, 4)
lodestream_crc64_chunks(const unsigned char* __restrict__ data, u64 bytes, u64 chunk_bytes, u64* __restrict__ sums) {
    __shared__ u32 image[ROWS * COLUMNS];
    __shared__ u64 terms[ROWS];

    const u64 chunk = blockIdx.x;
    const u32 thread = threadIdx.x;
    // Divided, not multiplied: the product may be past 64 bits. All of a block returns here, or none.
    if (bytes == 0 || chunk > (bytes - 1) / chunk_bytes) return;
    const u64 start = chunk * chunk_bytes;
    const u64 length = bytes - start < chunk_bytes ? bytes - start : chunk_bytes;
    const unsigned char* const first = data + start;

    // The chunk is a head of a few bytes up to an aligned address, whole words, and a tail of at most 3 bytes. The state
    // that the checksum has after the head is added to the first two words, and so both must lie in the first round:
    // a word that would be there alone belongs to the head.
    const u64 round_words = ROWS * COLUMNS;
    const u64 unaligned = -(u64)first & 3;
    u64 head = unaligned < length ? unaligned : length;
    if ((length - head) / 4 % round_words == 1) head += 4;
    const u64 words = (length - head) / 4;
    const u64 state = after_bytes(~0ull, first, head);
    if (words == 0) {
        if (thread == 0) sums[chunk] = ~after_bytes(state, first + head, length - head);
        return;
    }

    // Zero words before the first fill the table up to whole rounds of 64 rows; they change nothing.
    const u64 rounds = (words + round_words - 1) / round_words;
    const u64 filling = rounds * round_words - words;
    const u32* const body = (const u32*)(first + head);
    u32 window[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        const u64 place = row * COLUMNS + thread;
        u32 word = 0;
        if (place >= filling) {
            const u64 index = place - filling;
            word = body[index];
            if (index == 0) word ^= (u32)state;
            if (index == 1) word ^= (u32)(state >> 32);
        }
        window[row] = word;
    }
    if (rounds > 1) {
        // The second round begins at a word that exists: less than one round is filled.
        const u32* column = body + (round_words - filling) + thread;
        u32 ahead[ROWS_AHEAD];
#pragma unroll
        for (int row = 0; row < ROWS_AHEAD; ++row) ahead[row] = column[row * COLUMNS];
        Held held = {window};
        divide<64, 128>(window, held);
#pragma unroll 1
        for (u64 round = 2; round < rounds; ++round) {
            Stream<false> stream = {column, ahead};
            divide<0, 128>(window, stream);
            column += round_words;
        }
        Stream<true> stream = {column, ahead};
        divide<0, 64>(window, stream);
    }

    // The remainder of all columns, in the order of the message; then as a message of half as many columns, and again.
#pragma unroll
    for (int row = 0; row < ROWS; ++row) image[row * COLUMNS + thread] = window[row];
    __syncthreads();
#pragma unroll 1
    for (u32 columns = COLUMNS / 2; columns > 0; columns /= 2) {
        if (thread < columns) {
            Image upper = {image + thread, columns};
            divide<64, 128>(window, upper);
            Image lower = {image + ROWS * columns + thread, columns};
            divide<0, 64>(window, lower);
            // No barrier here: these places are the thread's own upper rows, and nobody else reads them.
#pragma unroll
            for (int row = 0; row < ROWS; ++row) image[row * columns + thread] = window[row];
        }
        __syncthreads();
    }

    if (thread < ROWS) terms[thread] = product(image[thread], POWERS.of[thread]);
    __syncthreads();
    if (thread == 0) {
        u64 sum = 0;
        for (int i = 0; i < ROWS; ++i) sum ^= terms[i];
        const u64 done = head + words * 4;
        sums[chunk] = ~after_bytes(sum, first + done, length - done);
    }
}

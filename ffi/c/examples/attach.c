/*
 * Makes a model resident, attaches to it, and prints each tensor with a sum over its bytes.
 *
 *   cc -std=c11 attach.c $(pkg-config --cflags --libs lodestream) -o attach
 *   ./attach /run/lodestream/lodestream.sock /models/llama
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <lodestream.h>

static int failed(const char *what) {
  fprintf(stderr, "%s: %s [%s]%s\n", what, lodestream_error_message(), lodestream_error_code(),
          lodestream_error_retryable() ? " (may succeed later)" : "");
  return EXIT_FAILURE;
}

/* Counts the calls in `data`, and lets the load go on. */
static int on_progress(const struct lodestream_progress *progress, void *data) {
  int *calls = data;
  *calls += 1;
  fprintf(stderr, "%" PRIu64 " of %" PRIu64 " bytes\n", progress->bytes, progress->total);
  return 0;
}

/* FNV-1a: enough to see whether the bytes are the right ones. */
static uint64_t sum(const unsigned char *bytes, uint64_t count) {
  uint64_t hash = UINT64_C(0xcbf29ce484222325);
  for (uint64_t place = 0; place < count; place++) {
    hash = (hash ^ bytes[place]) * UINT64_C(0x100000001b3);
  }
  return hash;
}

static int print(const struct lodestream_attached *attached) {
  size_t count = lodestream_tensor_count(attached);
  for (size_t index = 0; index < count; index++) {
    struct lodestream_tensor tensor, same;
    if (lodestream_tensor_at(attached, index, &tensor) != 0) {
      return failed("lodestream_tensor_at");
    }
    if (lodestream_tensor_by_name(attached, tensor.name, &same) != 0 || same.data != tensor.data) {
      return failed("lodestream_tensor_by_name");
    }
    printf("%s %s [", tensor.name, tensor.dtype);
    for (size_t dimension = 0; dimension < tensor.rank; dimension++) {
      printf(dimension == 0 ? "%" PRIu64 : ", %" PRIu64, tensor.shape[dimension]);
    }
    printf("] %" PRIu64 " %016" PRIx64 "\n", tensor.nbytes, sum(tensor.data, tensor.nbytes));
  }
  return EXIT_SUCCESS;
}

int main(int argc, char **argv) {
  if (argc < 3 || argc > 4) {
    fprintf(stderr, "usage: %s SOCKET SOURCE [OPTIONS]\n", argv[0]);
    return 2;
  }
  const char *options = argc == 4 ? argv[3] : NULL;
  struct lodestream_client *client = lodestream_connect(argv[1]);
  if (client == NULL) {
    return failed("lodestream_connect");
  }
  int calls = 0, status = EXIT_FAILURE;
  struct lodestream_attached *attached = NULL;
  if (lodestream_prefetch(client, argv[2], NULL, on_progress, &calls) != 0) {
    failed("lodestream_prefetch");
  } else if ((attached = lodestream_attach(client, argv[2], options)) == NULL) {
    failed("lodestream_attach");
  } else if (lodestream_release(client, attached) != 0) {
    failed("lodestream_release");
  } else {
    status = calls > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
  }
  /* What is attached stays readable without its lease and without the client. */
  lodestream_close(client);
  if (status == EXIT_SUCCESS) {
    status = print(attached);
  }
  lodestream_attached_free(attached);
  return status;
}

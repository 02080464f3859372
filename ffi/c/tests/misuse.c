/* What a careless program does: every call must fail as it is documented, and none may crash. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <lodestream.h>

static void check(int holds, const char *what, int line) {
  if (!holds) {
    const char *code = lodestream_error_code();
    fprintf(stderr, "line %d: %s does not hold; last error %s\n", line, what, code == NULL ? "none" : code);
    exit(EXIT_FAILURE);
  }
}
#define CHECK(condition) check((condition), #condition, __LINE__)

static int code_is(const char *code) {
  return lodestream_error_code() != NULL && strcmp(lodestream_error_code(), code) == 0 &&
         lodestream_error_message() != NULL && strlen(lodestream_error_message()) > 0;
}

static int cancel(const struct lodestream_progress *progress, void *data) {
  (void)progress;
  return *(int *)data;
}

int main(int argc, char **argv) {
  CHECK(argc == 3);
  struct lodestream_tensor tensor;
  CHECK(strcmp(lodestream_version(), "0.1.0") == 0);
  CHECK(lodestream_error_code() == NULL && lodestream_error_message() == NULL && !lodestream_error_retryable());

  CHECK(lodestream_connect("/nonexistent/socket") == NULL && code_is("client.connect") && lodestream_error_retryable());
  CHECK(lodestream_connect("\xff\xfe") == NULL && code_is("api.bad_params") && !lodestream_error_retryable());
  CHECK(lodestream_attach(NULL, argv[2], NULL) == NULL && code_is("api.bad_params"));
  CHECK(lodestream_prefetch(NULL, argv[2], NULL, NULL, NULL) == -1 && code_is("api.bad_params"));
  CHECK(lodestream_release(NULL, NULL) == -1 && code_is("api.bad_params"));
  CHECK(lodestream_tensor_count(NULL) == 0 && code_is("api.bad_params"));
  CHECK(lodestream_tensor_at(NULL, 0, &tensor) == -1 && code_is("api.bad_params"));
  lodestream_close(NULL);
  CHECK(lodestream_error_code() == NULL);
  lodestream_attached_free(NULL);

  struct lodestream_client *client = lodestream_connect(argv[1]);
  CHECK(client != NULL && lodestream_error_code() == NULL);
  CHECK(lodestream_attach(client, NULL, NULL) == NULL && code_is("api.bad_params"));
  CHECK(lodestream_attach(client, argv[2], "not json") == NULL && code_is("api.bad_params"));
  CHECK(lodestream_attach(client, argv[2], "{\"wiat\": false}") == NULL && code_is("api.bad_params"));
  CHECK(lodestream_attach(client, argv[2], "{\"wait\": false}") == NULL && code_is("artifact.not_resident"));
  CHECK(lodestream_attach(client, "/nonexistent", NULL) == NULL && code_is("source.file.outside_root"));
  CHECK(lodestream_attach(client, "sha256:00", NULL) == NULL && code_is("artifact.not_found"));

  int stop = 1;
  CHECK(lodestream_prefetch(client, argv[2], NULL, cancel, &stop) == 0 || code_is("job.cancelled"));
  CHECK(lodestream_prefetch(client, argv[2], "{\"deadline_ms\": 60000}", NULL, NULL) == 0);

  struct lodestream_attached *attached = lodestream_attach(client, argv[2], "{\"select\": [\"embed.*\"]}");
  CHECK(attached != NULL && lodestream_tensor_count(attached) == 1);
  CHECK(lodestream_tensor_at(attached, 0, &tensor) == 0 && strcmp(tensor.name, "embed.weight") == 0);
  CHECK(tensor.rank == 2 && tensor.shape[0] * tensor.shape[1] * 2 == tensor.nbytes && tensor.data != NULL);
  CHECK(lodestream_tensor_at(attached, 1, &tensor) == -1 && code_is("api.bad_params"));
  CHECK(lodestream_tensor_at(attached, (size_t)-1, &tensor) == -1 && code_is("api.bad_params"));
  CHECK(lodestream_tensor_at(attached, 0, NULL) == -1 && code_is("api.bad_params"));
  CHECK(lodestream_tensor_by_name(attached, "no such", &tensor) == -1 && code_is("select.no_match"));
  CHECK(lodestream_tensor_by_name(attached, NULL, &tensor) == -1 && code_is("api.bad_params"));
  CHECK(lodestream_release(client, attached) == 0);
  CHECK(lodestream_release(client, attached) == -1 && code_is("lease.not_found"));
  lodestream_attached_free(attached);
  lodestream_close(client);
  return EXIT_SUCCESS;
}

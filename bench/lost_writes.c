// A library for LD_PRELOAD that remembers what a process has made durable, so that a test can take
// the rest away (lost_writes.py).
//
// Below the directory $LOST_WRITES_WATCHED, whenever fsync() or fdatasync() returns, what they made
// durable has been copied to $LOST_WRITES_DURABLE: of a file its bytes, as "file.ID", of a directory
// the names in it, as "directory.ID", lines of "ID NAME". An ID is an inode and the time it was
// made, as inodes are used again.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int identify(int directory, const char* name, int flags, char* id, size_t size, int* folder) {
  struct statx status;
  if (statx(directory, name, flags | AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME,
            &status) != 0)
    return -1;
  *folder = S_ISDIR(status.stx_mode);
  snprintf(id, size, "%llu.%lld.%u", (unsigned long long)status.stx_ino,
           (long long)status.stx_btime.tv_sec, status.stx_btime.tv_nsec);
  return 0;
}

static void copy_bytes(int from, int to) {
  static const size_t kBlock = 1 << 16;
  char block[1 << 16];
  for (off_t at = 0;;) {
    const ssize_t got = pread(from, block, kBlock, at);
    if (got <= 0) return;
    if (write(to, block, (size_t)got) != got) return;
    at += got;
  }
}

static void copy_names(const char* path, int to) {
  DIR* const names = opendir(path);
  if (names == NULL) return;
  for (const struct dirent* entry; (entry = readdir(names)) != NULL;) {
    char id[96];
    int folder;
    if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
    if (identify(dirfd(names), entry->d_name, 0, id, sizeof(id), &folder) == 0)
      dprintf(to, "%s %s\n", id, entry->d_name);
  }
  closedir(names);
}

static void remember(int descriptor) {
  const char* const watched = getenv("LOST_WRITES_WATCHED");
  const char* const durable = getenv("LOST_WRITES_DURABLE");
  if (watched == NULL || durable == NULL) return;
  char link[64], path[PATH_MAX], id[96], fresh[PATH_MAX + 192], kept[PATH_MAX + 128];
  snprintf(link, sizeof(link), "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof(path) - 1);
  if (length <= 0) return;
  path[length] = 0;
  if (strncmp(path, watched, strlen(watched)) != 0) return;
  int folder;
  if (identify(descriptor, "", AT_EMPTY_PATH, id, sizeof(id), &folder) != 0) return;
  snprintf(kept, sizeof(kept), "%s/%s.%s", durable, folder ? "directory" : "file", id);
  snprintf(fresh, sizeof(fresh), "%s.%d.new", kept, gettid());
  const int to = open(fresh, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (to < 0) return;
  // A descriptor for direct I/O, or for writing alone, would not do.
  const int from = folder ? -1 : open(path, O_RDONLY);
  if (folder) copy_names(path, to);
  if (from >= 0) copy_bytes(from, to);
  if (from >= 0) close(from);
  close(to);
  rename(fresh, kept);
}

static int sync_and_remember(const char* name, int descriptor) {
  int (*const sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
  const int result = sync(descriptor);
  const int error = errno;
  if (result == 0) remember(descriptor);
  errno = error;
  return result;
}

int fsync(int descriptor) { return sync_and_remember("fsync", descriptor); }
int fdatasync(int descriptor) { return sync_and_remember("fdatasync", descriptor); }

//go:build cgo && seccomp

// libseccomp needs some 10 ms to compile docker's profile, for every container anew, and
// libcontainer takes no program compiled before. The linker therefore leads libcontainer's calls
// of libseccomp here (ld's --wrap). They are written down; when the program is asked for and the
// calls are, byte for byte, those that the given program was made by, that is handed out.
// Otherwise libseccomp gets the calls and compiles, as it always did. So nothing decides which
// program a container gets but libcontainer's own calls.
//
// Everything happens in processes that make one filter: in others the calls go straight on.

#define _GNU_SOURCE // memfd_create, F_GET_SEALS
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <seccomp.h>

#include "program.h"


scmp_filter_ctx __real_seccomp_init(uint32_t action);
int __real_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch);
int __real_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value);
int __real_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int call, unsigned int count, const struct scmp_arg_cmp *args);
int __real_seccomp_load(const scmp_filter_ctx ctx);
int __real_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd);

// The file: this, then the calls, then the program.
struct header {
	uint32_t magic, calls, program; // the latter two in bytes
};

enum { MAGIC = 0x62657270, MAX_CALLS = 1 << 20, MAX_PROGRAM = 65535 * 8, MAX_ARGS = 6 };

// A call as it is written down; all bytes are set, for memcmp.
struct call {
	uint32_t kind, a, b, count;
	struct {
		uint32_t arg, op;
		uint64_t a, b;
	} args[MAX_ARGS];
};

enum { INIT = 1, ARCH, ATTR, RULE };

static enum { OFF, USE, RECORD } mode = OFF;
static int record_fd = -1;
static const unsigned char *given; // in USE: a mapped file that was checked
static struct call *calls;
static uint32_t count, room;

static int note(const struct call *c) {
	if (count == room) {
		uint32_t more = room ? room * 2 : 512;
		if (more > MAX_CALLS / sizeof *calls)
			return -ENOMEM;
		struct call *grown = realloc(calls, more * sizeof *calls);
		if (!grown)
			return -ENOMEM;
		calls = grown, room = more;
	}
	calls[count++] = *c;
	return 0;
}

// settle gives libseccomp the rules that were only written down, in their order.
static int settle(scmp_filter_ctx ctx) {
	if (mode != USE)
		return 0;
	mode = OFF;
	for (uint32_t i = 0; i < count; i++) {
		const struct call *c = &calls[i];
		if (c->kind != RULE)
			continue;
		struct scmp_arg_cmp args[MAX_ARGS];
		for (uint32_t j = 0; j < c->count; j++) {
			args[j].arg = c->args[j].arg;
			args[j].op = (enum scmp_compare)c->args[j].op;
			args[j].datum_a = c->args[j].a;
			args[j].datum_b = c->args[j].b;
		}
		int err = __real_seccomp_rule_add_array(ctx, c->a, (int)c->b, c->count, c->count ? args : NULL);
		if (err)
			return err;
	}
	return 0;
}

scmp_filter_ctx __wrap_seccomp_init(uint32_t action) {
	struct call c;
	memset(&c, 0, sizeof c);
	c.kind = INIT, c.a = action;
	if (mode != OFF && (count != 0 || note(&c) != 0))
		return NULL; // a second filter: not foreseen, so not made
	return __real_seccomp_init(action);
}

// passed_on writes a call down that libseccomp gets at once. It must then have the rules before it.
static int passed_on(scmp_filter_ctx ctx, uint32_t kind, uint32_t a, uint32_t b) {
	if (mode == OFF)
		return 0;
	if (count > 0 && calls[count - 1].kind == RULE && mode == USE)
		return settle(ctx);
	struct call c;
	memset(&c, 0, sizeof c);
	c.kind = kind, c.a = a, c.b = b;
	return note(&c);
}

int __wrap_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch) {
	int err = passed_on(ctx, ARCH, arch, 0);
	return err ? err : __real_seccomp_arch_add(ctx, arch);
}

int __wrap_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value) {
	int err = passed_on(ctx, ATTR, (uint32_t)attr, value);
	return err ? err : __real_seccomp_attr_set(ctx, attr, value);
}

int __wrap_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int call, unsigned int n, const struct scmp_arg_cmp *args) {
	if (mode == OFF)
		return __real_seccomp_rule_add_array(ctx, action, call, n, args);
	if (n > MAX_ARGS || (n > 0 && !args))
		return -EINVAL;
	struct call c;
	memset(&c, 0, sizeof c);
	c.kind = RULE, c.a = action, c.b = (uint32_t)call, c.count = n;
	for (unsigned int j = 0; j < n; j++) {
		c.args[j].arg = args[j].arg;
		c.args[j].op = (uint32_t)args[j].op;
		c.args[j].a = args[j].datum_a;
		c.args[j].b = args[j].datum_b;
	}
	int err = note(&c);
	if (err || mode == USE)
		return err; // an error that libseccomp finds in it the export returns
	return __real_seccomp_rule_add_array(ctx, action, call, n, args);
}

// libcontainer exports the program and loads it itself; a filter loaded here would lack the rules.
int __wrap_seccomp_load(const scmp_filter_ctx ctx) {
	int err = settle(ctx);
	return err ? err : __real_seccomp_load(ctx);
}

static int write_all(int fd, const void *bytes, size_t n) {
	for (const char *p = bytes; n > 0;) {
		ssize_t done = write(fd, p, n);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done < 0 ? -errno : -EIO;
		p += done, n -= (size_t)done;
	}
	return 0;
}

// write_record writes the file that berth_program_use reads.
static int write_record(const scmp_filter_ctx ctx) {
	int fd = memfd_create("program", MFD_CLOEXEC);
	if (fd < 0)
		return -errno;
	struct stat st;
	void *program = MAP_FAILED;
	int err = __real_seccomp_export_bpf(ctx, fd);
	if (!err && (fstat(fd, &st) || st.st_size == 0 || st.st_size > MAX_PROGRAM))
		err = -EIO;
	if (!err && (program = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0)) == MAP_FAILED)
		err = -errno;
	close(fd);
	if (err)
		return err;
	struct header h = {MAGIC, (uint32_t)(count * sizeof *calls), (uint32_t)st.st_size};
	err = write_all(record_fd, &h, sizeof h);
	if (!err)
		err = write_all(record_fd, calls, h.calls);
	if (!err)
		err = write_all(record_fd, program, h.program);
	munmap(program, (size_t)st.st_size);
	return err ? err : -ECANCELED;
}

int __wrap_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd) {
	if (mode == RECORD)
		return write_record(ctx);
	if (mode == USE) {
		const struct header *h = (const struct header *)given;
		if (h->calls == count * sizeof *calls && memcmp(given + sizeof *h, calls, h->calls) == 0)
			return write_all(fd, given + sizeof *h + h->calls, h->program);
	}
	int err = settle(ctx);
	return err ? err : __real_seccomp_export_bpf(ctx, fd);
}

int berth_program_use(int fd) {
	int seals = fcntl(fd, F_GET_SEALS);
	if (seals < 0 || !(seals & F_SEAL_WRITE))
		return 0;
	if (fcntl(fd, F_SETFD, FD_CLOEXEC))
		return 0;
	struct stat st;
	if (fstat(fd, &st) || st.st_size < (off_t)sizeof(struct header) || st.st_size > (off_t)(sizeof(struct header) + MAX_CALLS + MAX_PROGRAM))
		return 0;
	const unsigned char *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (map == MAP_FAILED)
		return 0;
	const struct header *h = (const struct header *)map;
	if (h->magic != MAGIC || h->calls > MAX_CALLS || h->program == 0 || h->program > MAX_PROGRAM ||
	    (off_t)(sizeof *h + h->calls + h->program) != st.st_size) {
		munmap((void *)map, (size_t)st.st_size);
		return 0;
	}
	given = map, mode = USE;
	return 1;
}

void berth_program_record(int fd) {
	record_fd = fd, mode = RECORD;
}

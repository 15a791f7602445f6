// Precompiled seccomp programs; see program.c.
#ifndef BERTH_PROGRAM_H
#define BERTH_PROGRAM_H

// berth_program_use has this process take its seccomp program from the sealed file fd, if it is
// one and was made by the same calls of libseccomp. It returns whether fd is such a file.
int berth_program_use(int fd);

// berth_program_record has this process write the calls and the program made of them to fd
// instead of handing the program out; the export then fails with ECANCELED.
void berth_program_record(int fd);

#endif

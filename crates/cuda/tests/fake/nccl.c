// NCCL among threads of one process, without a card: messages go through a list, in the order of their pair. ASYNC is the error of a
// communicator, SEND that of every send.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef ASYNC
#define ASYNC 0
#endif
#ifndef SEND
#define SEND 0
#endif
#define MAGIC 0x4e43434c
#define MOST 16

typedef struct {
    char internal[128];
} unique_id;
struct comm {
    int magic, rank, ranks, meeting;
};
struct message {
    int meeting, from, to;
    size_t count;
    float *values;
    struct message *next;
};
struct op {
    int receive;
    void *place;
    size_t count;
    int peer;
    struct comm *comm;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct message *messages;
static int meetings, came[256][MOST], gone[256], open_comms;
static _Thread_local int depth, num_ops;
static _Thread_local struct op ops[256];
static _Thread_local const char *last = "";

// What tests ask beside the library's functions.
int fake_open(void) { return open_comms; }
int fake_depth(void) { return depth; }

static int wrong(int result, const char *why) { return last = why, result; }
// Waits for a change, with the lock; who waits five seconds has lost the others.
static int wait_for_change(void) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 5;
    return pthread_cond_timedwait(&changed, &lock, &until);
}

int ncclGetVersion(int *version) { return *version = 23007, 0; }
int ncclGetUniqueId(unique_id *id) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < 128; i++) id->internal[i] = (char)(meetings + 3 * i);
    meetings++;
    pthread_mutex_unlock(&lock);
    return 0;
}
int ncclCommInitRank(struct comm **made, int ranks, unique_id id, int rank) {
    int meeting = (unsigned char)id.internal[0];
    for (int i = 0; i < 128; i++)
        if (id.internal[i] != (char)(meeting + 3 * i)) return wrong(4, "no id of a meeting");
    if (meeting >= meetings || ranks < 1 || ranks > MOST || rank < 0 || rank >= ranks) return wrong(4, "no such meeting");
    pthread_mutex_lock(&lock);
    int result = came[meeting][rank] ? wrong(5, "Duplicate rank") : 0;
    if (!result) came[meeting][rank] = 1;
    pthread_cond_broadcast(&changed);
    for (int i = 0; i < ranks && !result;) {
        if (came[meeting][i]) i++;
        else if (wait_for_change()) result = wrong(6, "not all ranks came");
    }
    if (!result) {
        *made = malloc(sizeof(struct comm));
        **made = (struct comm){MAGIC, rank, ranks, meeting};
        open_comms++;
    }
    pthread_mutex_unlock(&lock);
    return result;
}
static int add(int receive, void *place, size_t count, int type, int peer, struct comm *comm, void *stream) {
    if (comm->magic != MAGIC || stream != (void *)7) return wrong(4, "no communicator, or no stream");
    if (type != 7 || !place || !count) return wrong(4, "no values");
    if (peer < 0 || peer >= comm->ranks || peer == comm->rank) return wrong(4, "no such peer");
    // Alone, two that send to each other would wait for ever.
    if (!depth || num_ops == 256) return wrong(5, "not in a group");
    ops[num_ops++] = (struct op){receive, place, count, peer, comm};
    return 0;
}
int ncclSend(void *from, size_t count, int type, int peer, struct comm *comm, void *stream) {
    return SEND ? wrong(SEND, "a send of a test") : add(0, from, count, type, peer, comm, stream);
}
int ncclRecv(void *to, size_t count, int type, int peer, struct comm *comm, void *stream) {
    return add(1, to, count, type, peer, comm, stream);
}
int ncclGroupStart(void) { return depth++, 0; }
static int receive(struct op *op) {
    for (;;) {
        for (struct message **at = &messages; *at; at = &(*at)->next) {
            struct message *found = *at;
            if (found->meeting != op->comm->meeting || found->from != op->peer || found->to != op->comm->rank) continue;
            if (found->count != op->count) return wrong(5, "counts differ");
            memcpy(op->place, found->values, op->count * 4);
            *at = found->next;
            free(found->values);
            free(found);
            return 0;
        }
        if (wait_for_change()) return wrong(6, "a message does not come");
    }
}
int ncclGroupEnd(void) {
    if (!depth) return wrong(5, "no group");
    if (--depth) return 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < num_ops; i++) {
        if (ops[i].receive) continue;
        struct message *sent = malloc(sizeof(struct message)), **end = &messages;
        *sent = (struct message){ops[i].comm->meeting, ops[i].comm->rank, ops[i].peer, ops[i].count};
        sent->values = malloc(ops[i].count * 4);
        memcpy(sent->values, ops[i].place, ops[i].count * 4);
        while (*end) end = &(*end)->next;
        *end = sent;
    }
    pthread_cond_broadcast(&changed);
    int result = 0;
    for (int i = 0; i < num_ops && !result; i++)
        if (ops[i].receive) result = receive(&ops[i]);
    num_ops = 0;
    pthread_mutex_unlock(&lock);
    return result;
}
int ncclCommGetAsyncError(struct comm *comm, int *error) { return *error = ASYNC, comm->magic == MAGIC ? 0 : 4; }
// As NVIDIA's, it waits for the others.
int ncclCommDestroy(struct comm *comm) {
    if (comm->magic != MAGIC) return wrong(4, "no communicator");
    pthread_mutex_lock(&lock);
    comm->magic = 0;
    open_comms--;
    gone[comm->meeting]++;
    pthread_cond_broadcast(&changed);
    int result = 0;
    while (gone[comm->meeting] < comm->ranks && !result)
        if (wait_for_change()) result = wrong(6, "not all ranks end");
    pthread_mutex_unlock(&lock);
    return result;
}
const char *ncclGetErrorString(int result) { return result == 6 ? "remote process exited" : "an error of a test"; }
const char *ncclGetLastError(struct comm *comm) { return comm ? "not asked so" : last; }

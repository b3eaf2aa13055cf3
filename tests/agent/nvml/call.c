/* A libnvidia-ml.so.1 over a simulated node: the calls that Token Factory uses, with NVML's own names,
 * structs and error codes, as the public documentation and the published bindings give them.
 *
 * The node is the file that TOKENFACTORY_NVML_STATE names when nvmlInit is called (sim.h). This part is about the
 * library as such: loading it, and what every call goes through. The calls on GPUs are in the other parts.
 */
#define _GNU_SOURCE
#include "nvml.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t init_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct sim_node *node;      /* stays mapped when shut down: another thread may hang inside */
static int references;
static uint32_t generation;
struct handle whole[SIM_GPUS];
struct handle slices[SIM_GPUS][SIM_INSTANCES];

#define NAME(name) #name,
static const char *const names[] = {FUNCTIONS(NAME)};

EXPORT const char *sim_function_name(uint32_t function) { return function < F_COUNT ? names[function] : NULL; }

struct sim_fault *fault_for(struct sim_state *s, int function, int gpu)
{
    for (int i = 0; i < SIM_FAULTS; i++) {
        struct sim_fault *f = &s->faults[i];
        if (f->active && f->remaining != 0 && (f->function < 0 || f->function == function)
            && (f->gpu < 0 || (gpu != NO_GPU && f->gpu == gpu)))
            return f;
    }
    return NULL;
}

/* Delays, hangs and injected errors, in that order. Called and left with the lock held. */
int suffer(struct sim_node *n, struct sim_state *s, int function, int gpu)
{
    struct sim_fault *f = fault_for(s, function, gpu);
    if (f == NULL)
        return SUCCESS;
    int error = f->error;
    uint32_t delay = f->delay_us;
    int hang = f->hang != 0;
    if (f->remaining > 0)
        f->remaining--;
    if (delay > 0) {
        struct timespec ts = {delay / 1000000, (long)(delay % 1000000) * 1000};
        sim_unlock(n);
        nanosleep(&ts, NULL);
        sim_lock(n);
    }
    if (hang) {
        s->hanging++;
        while (f->active && f->hang) {
            uint32_t seen = s->wake;
            sim_unlock(n);
            sim_wait(n, seen, -1);
            sim_lock(n);
        }
        s->hanging--;
    }
    return error;
}

int begin(struct call *c, int function, int gpu)
{
    pthread_mutex_lock(&init_mutex);
    struct sim_node *n = references > 0 ? node : NULL;
    uint32_t mine = generation;
    pthread_mutex_unlock(&init_mutex);
    if (n == NULL)
        return UNINITIALIZED;
    *c = (struct call){.node = n, .state = sim_lock(n), .index = gpu, .instance = -1};
    c->state->calls[function]++;
    int error = suffer(n, c->state, function, gpu);
    if (error == SUCCESS && !c->state->driver_loaded)
        error = DRIVER_NOT_LOADED;
    else if (error == SUCCESS && c->state->driver_generation != mine)
        error = (int)c->state->stale_error;
    if (error != SUCCESS)
        sim_unlock(n);
    return error;
}

int leave(struct call *c, int result)
{
    if (c->dirty)
        sim_commit(c->node);
    else
        sim_unlock(c->node);
    return result;
}

int begin_on(struct call *c, int function, const struct handle *h, int slice_allowed)
{
    const struct handle *first = whole, *slice = &slices[0][0];
    if (!(h >= first && h < first + SIM_GPUS) && !(h >= slice && h < slice + SIM_GPUS * SIM_INSTANCES))
        return INVALID_ARGUMENT;
    int error = begin(c, function, h->gpu);
    if (error != SUCCESS)
        return error;
    c->instance = h->instance;
    c->gpu = &c->state->gpus[h->gpu];
    if ((uint32_t)h->gpu >= c->state->gpu_count || !c->gpu->present)
        return leave(c, INVALID_ARGUMENT);
    if (c->gpu->lost)
        return leave(c, GPU_IS_LOST);
    if (h->instance >= 0 && ((uint32_t)h->instance >= c->gpu->instance_count || !c->gpu->mig_current))
        return leave(c, INVALID_ARGUMENT);
    if (h->instance >= 0 && !slice_allowed)
        return leave(c, NOT_SUPPORTED);
    return SUCCESS;
}

int may_write(const struct call *c)
{
    if (c->state->permission == SIM_ALLOW)
        return 1;
    return c->state->permission == SIM_BY_USER && geteuid() == 0;
}

int text(struct call *c, char *to, unsigned length, const char *from)
{
    if (to == NULL)
        return leave(c, INVALID_ARGUMENT);
    if (strlen(from) + 1 > length)
        return leave(c, INSUFFICIENT_SIZE);
    strcpy(to, from);
    return leave(c, SUCCESS);
}

int number(struct call *c, unsigned *to, unsigned value)
{
    if (to == NULL)
        return leave(c, INVALID_ARGUMENT);
    *to = value;
    return leave(c, SUCCESS);
}

int64_t now(const struct call *c) { return sim_now(c->state); }

/* ---- loading and unloading ---- */

static int join(struct sim_state *s)
{
    uint32_t me = (uint32_t)getpid();
    int room = -1;
    for (int i = 0; i < SIM_CLIENTS; i++) {
        if (s->clients[i] == me)
            return SUCCESS;
        if (s->clients[i] == 0)
            room = i;
    }
    if (room < 0)
        return UNKNOWN;
    s->clients[room] = me;
    return SUCCESS;
}

static int init(int function)
{
    const char *path = getenv("TOKENFACTORY_NVML_STATE");
    if (path == NULL)
        return DRIVER_NOT_LOADED;
    pthread_mutex_lock(&init_mutex);
    int result = SUCCESS;
    struct sim_node *opened = NULL;
    if (references > 0 || (node != NULL && sim_is(node, path)))
        opened = node;
    else
        opened = sim_open(path);
    if (opened == NULL) {
        pthread_mutex_unlock(&init_mutex);
        return DRIVER_NOT_LOADED;
    }
    struct sim_state *s = sim_lock(opened);
    s->calls[function]++;
    result = suffer(opened, s, function, NO_GPU);
    if (result == SUCCESS && !s->driver_loaded)
        result = DRIVER_NOT_LOADED;
    if (result == SUCCESS)
        result = join(s);
    uint32_t current = s->driver_generation;
    sim_unlock(opened);
    node = opened;
    if (result == SUCCESS && references++ == 0) {
        generation = current;
        forget_event_sets();
        for (int i = 0; i < SIM_GPUS; i++) {
            whole[i] = (struct handle){i, -1};
            for (int j = 0; j < SIM_INSTANCES; j++)
                slices[i][j] = (struct handle){i, j};
        }
    }
    pthread_mutex_unlock(&init_mutex);
    return result;
}

EXPORT int nvmlInit_v2(void) { return init(F_nvmlInit_v2); }
EXPORT int nvmlInit(void) { return init(F_nvmlInit_v2); }
EXPORT int nvmlInitWithFlags(unsigned flags) { (void)flags; return init(F_nvmlInitWithFlags); }

EXPORT int nvmlShutdown(void)
{
    pthread_mutex_lock(&init_mutex);
    if (references == 0) {
        pthread_mutex_unlock(&init_mutex);
        return UNINITIALIZED;
    }
    if (--references == 0) {
        struct sim_state *s = sim_lock(node);
        s->calls[F_nvmlShutdown]++;
        for (int i = 0; i < SIM_CLIENTS; i++)
            if (s->clients[i] == (uint32_t)getpid())
                s->clients[i] = SIM_CLIENT_LEFT;
        sim_unlock(node);
        sim_lock(node);      /* notices that nobody is left */
        sim_commit(node);    /* and wakes who waits for events */
    }
    pthread_mutex_unlock(&init_mutex);
    return SUCCESS;
}

EXPORT const char *nvmlErrorString(int code)
{
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case TIMEOUT: return "Timeout";
    case GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}

EXPORT int nvmlSystemGetDriverVersion(char *to, unsigned length)
{
    ENTER(nvmlSystemGetDriverVersion, to);
    return text(&c, to, length, c.state->driver_version);
}

EXPORT int nvmlSystemGetNVMLVersion(char *to, unsigned length)
{
    ENTER(nvmlSystemGetNVMLVersion, to);
    return text(&c, to, length, c.state->nvml_version);
}

EXPORT int nvmlSystemGetCudaDriverVersion(int *to)
{
    ENTER(nvmlSystemGetCudaDriverVersion, to);
    *to = (int)c.state->cuda_version;
    return leave(&c, SUCCESS);
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *to)
{
    ENTER(nvmlSystemGetCudaDriverVersion_v2, to);
    *to = (int)c.state->cuda_version;
    return leave(&c, SUCCESS);
}

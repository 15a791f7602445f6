package dockerapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	containertypes "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"

	"berth/internal/engine"
	"berth/internal/errdefs"
)

// statsInterval is how often docker samples.
const statsInterval = time.Second

// versionOneShot is from when a client may ask for a sample without the one before.
const versionOneShot = 41

func (s *Server) containerStats(w http.ResponseWriter, r *request) error {
	c, err := s.engine.Container(r.vars["id"])
	if err != nil {
		return err
	}
	stream := r.boolQueryOr("stream", true)
	oneShot := r.version >= versionOneShot && r.boolQuery("one-shot")
	if stream && oneShot {
		return invalid("cannot have stream=true and one-shot=true")
	}
	ctx, cancel := streamContext(r)
	defer cancel()
	sampler := statsSampler{server: s, id: c.Config.ID, name: c.Config.Name}
	sample, alive, err := sampler.next(ctx)
	if err != nil {
		return err
	}
	if !stream {
		if alive && !oneShot { // clients compute rates from two samples
			if err := sampler.pause(ctx); err != nil {
				return err
			}
			if sample, _, err = sampler.next(ctx); err != nil {
				return err
			}
		}
		return writeJSON(w, http.StatusOK, sample)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := json.NewEncoder(w)
	for {
		if err := out.Encode(sample); err != nil {
			return err
		}
		_ = http.NewResponseController(w).Flush() // the next write tells
		if err := sampler.pause(ctx); err != nil {
			return err
		}
		if sample, _, err = sampler.next(ctx); errors.Is(err, errdefs.ErrNotFound) {
			return nil // the container was removed
		} else if err != nil {
			return err
		}
	}
}

// statsSampler takes samples and remembers the last.
type statsSampler struct {
	server   *Server
	id, name string
	last     containertypes.StatsResponse
}

func (p *statsSampler) pause(ctx context.Context) error {
	t := time.NewTimer(statsInterval)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// next takes a sample; a container that does not run has an empty one (alive is false).
func (p *statsSampler) next(ctx context.Context) (sample containertypes.StatsResponse, alive bool, err error) {
	sample = containertypes.StatsResponse{ID: p.id, Name: "/" + p.name, OSType: runtime.GOOS}
	st, err := p.server.engine.Stats(ctx, p.id)
	if errors.Is(err, errdefs.ErrConflict) {
		return sample, false, nil
	}
	if err != nil {
		return sample, false, err
	}
	system, cpus, err := systemCPU()
	if err != nil {
		return sample, false, err
	}
	fillStats(&sample, st, p.server.info.CgroupVersion)
	sample.CPUStats.SystemUsage, sample.CPUStats.OnlineCPUs = system, cpus
	sample.PreRead, sample.PreCPUStats = p.last.Read, p.last.CPUStats
	p.last = sample
	return sample, true, nil
}

// fillStats translates the engine's counters.
func fillStats(out *containertypes.StatsResponse, st engine.Stats, cgroupVersion string) {
	out.Read = st.Time
	out.CPUStats.CPUUsage = containertypes.CPUUsage{
		TotalUsage: st.CPUNanos, UsageInUsermode: st.CPUUserNanos, UsageInKernelmode: st.CPUSysNanos,
	}
	out.CPUStats.ThrottlingData = containertypes.ThrottlingData{
		Periods: st.Periods, ThrottledPeriods: st.ThrottledPeriods, ThrottledTime: st.ThrottledNanos,
	}
	out.PidsStats = containertypes.PidsStats{Current: st.Pids, Limit: st.PidsLimit}
	limit := st.MemoryLimit
	if total := memoryTotal(); limit == 0 || limit > total {
		limit = total
	}
	inactive := "total_inactive_file" // what clients take off the usage, by its v1 name
	if cgroupVersion == "2" {
		inactive = "inactive_file"
	}
	out.MemoryStats = containertypes.MemoryStats{
		Usage: st.MemoryBytes, Limit: limit, MaxUsage: st.MemoryPeak,
		Stats: map[string]uint64{inactive: st.MemoryCache},
	}
	out.BlkioStats.IoServiceBytesRecursive = []containertypes.BlkioStatEntry{
		{Op: "read", Value: st.ReadBytes}, {Op: "write", Value: st.WriteBytes},
	}
	if len(st.Networks) > 0 {
		out.Networks = map[string]containertypes.NetworkStats{}
		for name, n := range st.Networks {
			out.Networks[name] = containertypes.NetworkStats{
				RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
				TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
			}
		}
	}
}

// clockTicks is USER_HZ, which Linux fixes at 100 for all architectures that Go has.
const clockTicks = 100

// systemCPU is the time that all CPUs together spent in any way, in nanoseconds, and how many
// there are (proc_stat(5); as docker, steal and guest time apart).
func systemCPU() (nanos uint64, cpus uint32, err error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	scan := bufio.NewScanner(bytes.NewReader(data))
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		f := strings.Fields(scan.Text())
		if len(f) < 8 || !strings.HasPrefix(f[0], "cpu") {
			continue
		}
		if f[0] != "cpu" {
			cpus++
			continue
		}
		for _, field := range f[1:8] {
			n, err := strconv.ParseUint(field, 10, 64)
			if err != nil {
				return 0, 0, err
			}
			nanos += n * (uint64(time.Second) / clockTicks)
		}
	}
	return nanos, cpus, scan.Err()
}

// memoryTotal is the node's memory in bytes.
func memoryTotal() uint64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return info.Totalram * uint64(info.Unit)
}

package main

import (
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"berth/internal/nodeapi"
	"berth/internal/nodeapi/wire"
)

// nodeOptions is what Berth's own routes tell about this node.
func (d *daemon) nodeOptions(sockets []string) nodeapi.Options {
	name := d.flags.nodeName
	if name == "" {
		name, _ = os.Hostname() // an unnamed machine shows as such
	}
	return nodeapi.Options{
		Engine: d.engine, Images: d.images, Processes: d.processes,
		Sockets: func() []string { return sockets },
		Node:    name, Version: version, Root: d.root.State, Run: d.root.Run,
		Started: d.started, Ready: time.Since(d.started), Logger: slog.Default(),
	}
}

// processes asks the holder who runs.
func (d *daemon) processes() ([]wire.Process, error) {
	st, err := d.holder.Status()
	if err != nil {
		return nil, err
	}
	out := []wire.Process{{Name: "berth-holder", PID: st.PID, Version: st.Version, RSSBytes: rssBytes(st.PID)}}
	for _, c := range st.Children {
		out = append(out, wire.Process{Name: c.Name, PID: c.PID, Version: c.Version, Started: c.Since, Restarts: c.Restarts, RSSBytes: rssBytes(c.PID)})
	}
	return out, nil
}

// rssBytes is a process's resident memory; 0 when it is gone.
func rssBytes(pid int) int64 {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(f[1], 10, 64) // the kernel's own number
	return pages * int64(os.Getpagesize())
}

package cli

import (
	"encoding/json"
	"fmt"
	"net/url"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

type psFlags struct {
	all, noTrunc, size bool
	last               int
	latest             bool
	filter             []string
	out                outputFlags
}

func (a *app) psCommand() *cobra.Command {
	var o psFlags
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List containers",
		Args:  exactArgs(0, ""),
		RunE:  func(cmd *cobra.Command, _ []string) error { return a.ps(cmd, o) },
	}
	f := cmd.Flags()
	f.BoolVarP(&o.all, "all", "a", false, "also those that do not run")
	f.BoolVarP(&o.out.quiet, "quiet", "q", false, "print IDs only")
	f.BoolVar(&o.noTrunc, "no-trunc", false, "do not shorten")
	f.BoolVarP(&o.size, "size", "s", false, "show the size of the writable layer")
	f.IntVarP(&o.last, "last", "n", 0, "the last n created, in any state")
	f.BoolVarP(&o.latest, "latest", "l", false, "the last created, in any state")
	f.StringArrayVarP(&o.filter, "filter", "f", nil, "only those for which name=value holds")
	o.out.add(cmd)
	o.out.addFormat(cmd)
	return cmd
}

func (a *app) ps(cmd *cobra.Command, o psFlags) error {
	if err := o.out.check(); err != nil {
		return err
	}
	q := url.Values{}
	if o.all {
		q.Set("all", "1")
	}
	if o.size {
		q.Set("size", "1")
	}
	if o.latest {
		o.last = 1
	}
	if o.last > 0 {
		q.Set("limit", strconv.Itoa(o.last))
	}
	if len(o.filter) > 0 {
		v, err := filters(o.filter)
		if err != nil {
			return err
		}
		q.Set("filters", v)
	}
	var raw json.RawMessage
	if err := a.call(cmd.Context(), "GET", docker(q, "containers", "json"), nil, &raw); err != nil {
		return err
	}
	var list []containerSummary
	if err := json.Unmarshal(raw, &list); err != nil {
		return platformError(fmt.Errorf("the daemon's list of containers is not understood: %w", err))
	}
	l := listing{
		raw: raw,
		columns: []column{{"ID", "CONTAINER ID"}, {"Image", "IMAGE"}, {"Command", "COMMAND"}, {"RunningFor", "CREATED"},
			{"Status", "STATUS"}, {"Ports", "PORTS"}, {"Names", "NAMES"}},
		wide: []column{{"State", "STATE"}, {"Networks", "NETWORKS"}, {"Mounts", "MOUNTS"}, {"CreatedAt", "CREATED AT"},
			{"Labels", "LABELS"}, {"Size", "SIZE"}},
	}
	if o.size {
		l.columns = append(l.columns, column{"Size", "SIZE"})
		l.wide = l.wide[:len(l.wide)-1]
	}
	noTrunc := o.noTrunc || o.out.form == "wide"
	for i := range list {
		l.rows = append(l.rows, containerRow(&list[i], noTrunc))
	}
	return o.out.print(a.Out, l)
}

// containerRow gives docker's words for one container.
func containerRow(c *containerSummary, noTrunc bool) row {
	names := make([]string, 0, len(c.Names))
	for _, n := range c.Names {
		names = append(names, strings.TrimPrefix(n, "/"))
	}
	created := time.Unix(c.Created, 0)
	id, command := c.ID, c.Command
	if !noTrunc {
		id, command = shortID(id), shorten(command, 20)
	}
	var mounts, networks, labels []string
	for _, m := range c.Mounts {
		if m.Name != "" {
			mounts = append(mounts, m.Name)
		} else {
			mounts = append(mounts, m.Source)
		}
	}
	for n := range c.NetworkSettings.Networks {
		networks = append(networks, n)
	}
	for k, v := range c.Labels {
		labels = append(labels, k+"="+v)
	}
	sort.Strings(networks)
	sort.Strings(labels)
	name := strings.Join(names, ",")
	return row{id: id, name: name, fields: map[string]string{
		"ID": id, "Image": c.Image, "Command": `"` + command + `"`, "RunningFor": ago(created),
		"CreatedAt": created.Format("2006-01-02 15:04:05 -0700 MST"),
		"Status":    c.Status, "State": c.State, "Ports": portsText(c.Ports), "Names": name,
		"Networks": strings.Join(networks, ","), "Mounts": strings.Join(mounts, ","), "Labels": strings.Join(labels, ","),
		"Size": units.HumanSizeWithPrecision(float64(c.SizeRw), 3),
	}}
}

// ago says how long ago t was.
func ago(t time.Time) string {
	if t.Unix() <= 0 {
		return "N/A"
	}
	return units.HumanDuration(time.Since(t)) + " ago"
}

// portsText is docker's form of published and exposed ports, with neighbouring ones joined.
func portsText(ports []portSummary) string {
	sort.Slice(ports, func(i, j int) bool {
		a, b := ports[i], ports[j]
		if a.IP != b.IP {
			return a.IP < b.IP
		}
		if a.Type != b.Type {
			return a.Type < b.Type
		}
		return a.PrivatePort < b.PrivatePort || a.PrivatePort == b.PrivatePort && a.PublicPort < b.PublicPort
	})
	var texts []string
	for i := 0; i < len(ports); {
		j := i + 1
		for j < len(ports) && follows(ports[j-1], ports[j]) {
			j++
		}
		texts = append(texts, portRange(ports[i], ports[j-1]))
		i = j
	}
	return strings.Join(texts, ", ")
}

func follows(a, b portSummary) bool {
	if a.IP != b.IP || a.Type != b.Type || b.PrivatePort != a.PrivatePort+1 {
		return false
	}
	return a.PublicPort == 0 && b.PublicPort == 0 || a.PublicPort != 0 && b.PublicPort == a.PublicPort+1
}

func portRange(first, last portSummary) string {
	span := func(a, b uint16) string {
		if a == b {
			return strconv.Itoa(int(a))
		}
		return fmt.Sprintf("%d-%d", a, b)
	}
	text := span(first.PrivatePort, last.PrivatePort) + "/" + first.Type
	if first.PublicPort == 0 {
		return text
	}
	host := first.IP
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + span(first.PublicPort, last.PublicPort) + "->" + text
}

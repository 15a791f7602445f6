package cli

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
)

func (a *app) imagesCommand() *cobra.Command {
	var (
		out             outputFlags
		all, noTrunc, d bool
		filter          []string
	)
	cmd := &cobra.Command{
		Use:   "images [NAME]",
		Short: "List images",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return exactArgs(1, "at most one NAME")(cmd, args)
			}
			return nil
		},
		ValidArgsFunction: a.completeImages(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if len(args) == 1 {
				filter = append(filter, "reference="+args[0])
			}
			q := url.Values{}
			if all {
				q.Set("all", "1")
			}
			if len(filter) > 0 {
				v, err := filters(filter)
				if err != nil {
					return err
				}
				q.Set("filters", v)
			}
			var raw json.RawMessage
			if err := a.call(cmd.Context(), "GET", docker(q, "images", "json"), nil, &raw); err != nil {
				return err
			}
			l, err := imageListing(raw, noTrunc || out.form == "wide", d)
			if err != nil {
				return err
			}
			return out.print(a.Out, l)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&all, "all", "a", false, "also intermediate images")
	f.BoolVarP(&out.quiet, "quiet", "q", false, "print IDs only")
	f.BoolVar(&noTrunc, "no-trunc", false, "do not shorten")
	f.BoolVar(&d, "digests", false, "show digests")
	f.StringArrayVarP(&filter, "filter", "f", nil, "only those for which name=value holds")
	out.add(cmd)
	out.addFormat(cmd)
	return cmd
}

// imageListing makes a row for each name of each image.
func imageListing(raw json.RawMessage, noTrunc, digests bool) (listing, error) {
	var list []imageSummary
	if err := json.Unmarshal(raw, &list); err != nil {
		return listing{}, platformError(fmt.Errorf("the daemon's list of images is not understood: %w", err))
	}
	l := listing{
		raw:     raw,
		columns: []column{{"Repository", "REPOSITORY"}, {"Tag", "TAG"}},
		wide:    []column{{"CreatedAt", "CREATED AT"}},
	}
	digest := column{"Digest", "DIGEST"}
	rest := []column{{"ID", "IMAGE ID"}, {"CreatedSince", "CREATED"}, {"Size", "SIZE"}}
	if digests {
		l.columns = append(append(l.columns, digest), rest...)
	} else {
		l.columns = append(l.columns, rest...)
		l.wide = append(l.wide, digest)
	}
	for i := range list {
		im := &list[i]
		tags := im.RepoTags
		if len(tags) == 0 {
			tags = []string{"<none>:<none>"}
		}
		for _, t := range tags {
			l.rows = append(l.rows, imageRow(im, t, noTrunc))
		}
	}
	return l, nil
}

func imageRow(im *imageSummary, ref string, noTrunc bool) row {
	repo, tag := ref, "<none>"
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		repo, tag = ref[:i], ref[i+1:]
	}
	digest := "<none>"
	for _, d := range im.RepoDigests {
		if r, dg, ok := strings.Cut(d, "@"); ok && (r == repo || repo == "<none>") {
			digest = dg
			if repo == "<none>" {
				repo = r
			}
			break
		}
	}
	id, name := im.ID, ref
	if !noTrunc {
		id = shortID(id)
	}
	if tag == "<none>" {
		name = im.ID
	}
	created := time.Unix(im.Created, 0)
	return row{id: id, name: name, fields: map[string]string{
		"ID": id, "Repository": repo, "Tag": tag, "Digest": digest, "CreatedSince": ago(created),
		"CreatedAt": created.Format("2006-01-02 15:04:05 -0700 MST"), "Size": units.HumanSizeWithPrecision(float64(im.Size), 3),
	}}
}

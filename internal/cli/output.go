package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// outputFlags choose the form of what a reading command prints.
type outputFlags struct {
	form   string // "", json, yaml, wide, name
	format string // docker's --format
	quiet  bool
}

func (o *outputFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.form, "output", "o", "", "form of the output: json, yaml, wide or name")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json", "yaml", "wide", "name"}, cobra.ShellCompDirectiveNoFileComp))
}

func (o *outputFlags) addFormat(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.format, "format", "", "docker's form: json, 'table {{.Names}}\\t{{.Status}}' or '{{.Names}}' with the names of columns")
}

func (o *outputFlags) check() error {
	switch o.form {
	case "", "json", "yaml", "wide", "name":
	default:
		return fmt.Errorf("-o %s: unknown; use json, yaml, wide or name", o.form)
	}
	if o.form != "" && (o.format != "" || o.quiet) {
		return fmt.Errorf("-o %s cannot be combined with --format or --quiet", o.form)
	}
	return nil
}

// column is one column of a listing: the field's name in --format and its heading.
type column struct{ field, heading string }

// listing is what a reading command has found.
type listing struct {
	columns []column
	wide    []column // behind columns with -o wide
	rows    []row
	raw     any // what -o json and yaml print
}

// row is one line of it.
type row struct {
	id, name string // for --quiet and -o name
	fields   map[string]string
}

// print writes l in the form asked for.
func (o *outputFlags) print(w io.Writer, l listing) error {
	switch {
	case o.form == "json":
		return printJSON(w, l.raw)
	case o.form == "yaml":
		return printYAML(w, l.raw)
	case o.form == "name":
		for _, r := range l.rows {
			fmt.Fprintln(w, r.name)
		}
		return nil
	case o.quiet:
		for _, r := range l.rows {
			fmt.Fprintln(w, r.id)
		}
		return nil
	case o.form == "wide":
		return printTable(w, append(append([]column(nil), l.columns...), l.wide...), l.rows)
	case o.format != "" && o.format != "table":
		return o.printFormat(w, l)
	}
	return printTable(w, l.columns, l.rows)
}

func printTable(w io.Writer, columns []column, rows []row) error {
	cells := make([][]string, 0, len(rows)+1)
	head := make([]string, len(columns))
	for i, c := range columns {
		head[i] = c.heading
	}
	cells = append(cells, head)
	for _, r := range rows {
		line := make([]string, len(columns))
		for i, c := range columns {
			line[i] = r.fields[c.field]
		}
		cells = append(cells, line)
	}
	return align(w, cells)
}

// align writes cells in columns three spaces apart.
func align(w io.Writer, cells [][]string) error {
	var width []int
	for _, line := range cells {
		for i, cell := range line {
			if i == len(width) {
				width = append(width, 0)
			}
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	var b bytes.Buffer
	for _, line := range cells {
		for i, cell := range line {
			b.WriteString(cell)
			if i < len(line)-1 {
				b.WriteString(strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell)+3))
			}
		}
		b.WriteByte('\n')
	}
	_, err := w.Write(b.Bytes())
	return err
}

// printFormat serves the plain part of docker's templates: fields, and all of them as JSON.
func (o *outputFlags) printFormat(w io.Writer, l listing) error {
	format, table := strings.CutPrefix(o.format, "table ")
	format = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(strings.TrimSpace(format))
	if format == "json" {
		format = "{{json .}}"
	}
	headings := map[string]string{}
	for _, c := range append(append([]column(nil), l.columns...), l.wide...) {
		headings[c.field] = c.heading
	}
	known := make(map[string]string, len(headings))
	for f := range headings {
		known[f] = ""
	}
	var lines []string
	if table {
		line, err := expand(format, headings)
		if err != nil {
			return err
		}
		lines = append(lines, line)
	} else if _, err := expand(format, known); err != nil {
		return err // also when there is nothing to list
	}
	for _, r := range l.rows {
		line, err := expand(format, r.fields)
		if err != nil {
			return err
		}
		lines = append(lines, line)
	}
	if !table {
		for _, line := range lines {
			fmt.Fprintln(w, line)
		}
		return nil
	}
	cells := make([][]string, len(lines))
	for i, line := range lines {
		cells[i] = strings.Split(line, "\t")
	}
	return align(w, cells)
}

// expand replaces {{.Field}} and {{json .}} in format.
func expand(format string, fields map[string]string) (string, error) {
	var b strings.Builder
	for rest := format; ; {
		before, after, found := strings.Cut(rest, "{{")
		b.WriteString(before)
		if !found {
			return b.String(), nil
		}
		expr, tail, ok := strings.Cut(after, "}}")
		if !ok {
			return "", fmt.Errorf("--format %q: a }} is missing", format)
		}
		rest = tail
		expr = strings.TrimSpace(expr)
		asJSON := false
		if e, ok := strings.CutPrefix(expr, "json "); ok {
			expr, asJSON = strings.TrimSpace(e), true
		}
		name, ok := strings.CutPrefix(expr, ".")
		value, known := fields[name]
		switch {
		case ok && name == "" && asJSON:
			raw, err := json.Marshal(fields)
			if err != nil {
				return "", err
			}
			b.Write(raw)
		case !ok || !known:
			return "", fmt.Errorf("--format {{%s}}: not supported; use {{json .}} or one of %s, or -o json", expr, fieldNames(fields))
		case asJSON:
			b.WriteString(quote(value))
		default:
			b.WriteString(value)
		}
	}
}

func fieldNames(fields map[string]string) string {
	names := make([]string, 0, len(fields))
	for n := range fields {
		names = append(names, "{{."+n+"}}")
	}
	sort.Strings(names)
	return strings.Join(names, " ")
}

// quote returns s as a JSON string, which is also YAML's double-quoted form.
func quote(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if e.Encode(s) != nil {
		return `""` // strings always encode
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printYAML prints what v is in JSON as YAML.
func printYAML(w io.Writer, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var tree any
	if err := d.Decode(&tree); err != nil {
		return err
	}
	var b bytes.Buffer
	writeYAML(&b, tree, 0, false)
	_, err = w.Write(b.Bytes())
	return err
}

// writeYAML writes v in block style. inline tells that the cursor stands behind "key:" or "-".
func writeYAML(b *bytes.Buffer, v any, indent int, inline bool) {
	pad := strings.Repeat("  ", indent)
	switch v := v.(type) {
	case map[string]any:
		if len(v) == 0 {
			b.WriteString(" {}\n"[boolInt(!inline):])
			return
		}
		if inline {
			b.WriteByte('\n')
		}
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			b.WriteString(pad + yamlScalar(k) + ":")
			writeYAML(b, v[k], indent+1, true)
		}
	case []any:
		if len(v) == 0 {
			b.WriteString(" []\n"[boolInt(!inline):])
			return
		}
		if inline {
			b.WriteByte('\n')
		}
		for _, item := range v {
			b.WriteString(pad + "-")
			writeYAML(b, item, indent+1, true)
		}
	default:
		if inline {
			b.WriteByte(' ')
		}
		b.WriteString(yamlScalar(v) + "\n")
	}
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// yamlScalar quotes every string that is not plainly a word.
func yamlScalar(v any) string {
	s, ok := v.(string)
	if !ok {
		return fmt.Sprint(jsonScalar(v))
	}
	switch strings.ToLower(s) {
	case "", "null", "true", "false", "yes", "no", "on", "off", "y", "n":
		return quote(s)
	}
	letter := s[0] >= 'a' && s[0] <= 'z' || s[0] >= 'A' && s[0] <= 'Z' || s[0] == '/'
	for _, r := range s {
		letter = letter && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/_.-", r))
	}
	if !letter {
		return quote(s)
	}
	return s
}

func jsonScalar(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case bool:
		return strconv.FormatBool(v)
	default:
		return fmt.Sprint(v) // json.Number
	}
}

// shorten cuts s to n characters, the last an ellipsis.
func shorten(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	return string([]rune(s)[:n-1]) + "…"
}

// shortID is the form of an ID that people see.
func shortID(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	if len(id) > 12 {
		return id[:12]
	}
	return id
}

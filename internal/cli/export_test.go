package cli

import "io"

// For tests in package cli_test.

var ParseKeys = parseKeys

func ParseImage(s string) (host, name, full string) {
	r := parseImage(s)
	return r.host, r.name, r.String()
}

func NewDetachReader(r io.Reader, keys []byte) io.Reader { return &detachReader{r: r, keys: keys} }

func IsDetached(err error) bool { return err == errDetached }

var (
	HasSocket = hasSocket
	UnitText  = unitText
	ParseTime = parseTime
)

// RequestOf returns the create request for a run command line, as it is sent.
func RequestOf(lookup func(string) (string, bool), args []string) (any, error) {
	var o runFlags
	o.lookup = lookup
	cmd := (&app{lookup: lookup}).runCommand()
	cmd.ResetFlags()
	o.add(cmd)
	if err := cmd.ParseFlags(args); err != nil {
		return nil, err
	}
	rest := cmd.Flags().Args()
	return o.request(rest[0], rest[1:])
}

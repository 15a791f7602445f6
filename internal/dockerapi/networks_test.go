package dockerapi_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"berth/internal/engine"
	"berth/internal/network"
)

func TestNetworkList(t *testing.T) {
	n := newNode(t)
	front := n.networks.add("front", network.DriverBridge, "172.20.0.0/16")
	n.networks.list[3].Config.Labels = map[string]string{"tier": "front"}
	n.networks.add("back", network.DriverBridge, "172.21.0.0/16")
	n.networks.endpoints = []network.Endpoint{{Sandbox: hexID("a"), NetworkID: front.ID}}
	for filter, want := range map[string]string{
		``:                                          "bridge host none front back",
		`{"name":["front"]}`:                        "front",
		`{"name":["^b"]}`:                           "bridge back",
		`{"id":["` + front.ID[:12] + `"]}`:          "front",
		`{"driver":["host","null"]}`:                "host none",
		`{"label":["tier=front"]}`:                  "front",
		`{"type":["custom"]}`:                       "front back",
		`{"type":["builtin"],"name":["none"]}`:      "none",
		`{"scope":["local"],"name":["back"]}`:       "back",
		`{"scope":["swarm"]}`:                       "",
		`{"dangling":["true"]}`:                     "back",
		`{"dangling":["false"],"name":["o"]}`:       "host none front",
		`{"name":{"front":true,"back":true}}`:       "front back",
		`{"label":{"tier":true},"type":["custom"]}`: "front",
	} {
		for _, version := range []string{"1.40", "1.52"} {
			var list []struct {
				Name       string
				Scope      string
				Containers map[string]any
			}
			n.get("/v"+version+"/networks?filters="+urlEscape(filter), &list)
			var names []string
			for _, one := range list {
				names = append(names, one.Name)
				if one.Scope != "local" || (one.Containers == nil) != (version == "1.52") {
					t.Errorf("%s in %s: %+v", one.Name, version, one)
				}
			}
			if got := strings.Join(names, " "); got != want {
				t.Errorf("%s in %s: %q, want %q", filter, version, got, want)
			}
		}
	}
	n.refused("GET", "/networks?filters="+urlEscape(`{"x":["y"]}`), "", 400, "invalid filter 'x'")
	n.refused("GET", "/networks?filters="+urlEscape(`{"type":["y"]}`), "", 400, "invalid filter: 'type'='y'")
	n.refused("GET", "/networks?filters="+urlEscape(`{"dangling":["y"]}`), "", 400, "invalid value for filter 'dangling'")
}

func TestNetworkInspect(t *testing.T) {
	n := newNode(t)
	front := n.networks.add("front", network.DriverBridge, "172.20.0.0/24")
	n.engine.run(hexID("a"), "web", engine.StatusRunning, "")
	n.networks.endpoints = []network.Endpoint{
		{Sandbox: hexID("a"), NetworkID: front.ID, Address: netip.MustParsePrefix("172.20.0.2/24"), MAC: "02:42:ac:14:00:02"},
		{Sandbox: hexID("b"), NetworkID: front.ID, Address: netip.MustParsePrefix("172.20.0.3/24"), MAC: "02:42:ac:14:00:03"},
	}
	var got struct {
		Name, ID, Driver, Created string
		IPAM                      struct {
			Driver string
			Config []struct{ Subnet, Gateway string }
		}
		Containers map[string]map[string]string
		Status     *struct {
			IPAM struct {
				Subnets map[string]struct{ IPsInUse, DynamicIPsAvailable int }
			}
		}
		ConfigFrom struct{ Network string }
		Options    map[string]string
	}
	n.get("/v1.52/networks/front", &got)
	if got.Name != "front" || got.ID != front.ID || got.Driver != "bridge" || got.IPAM.Driver != "default" || got.Options == nil ||
		got.IPAM.Config[0].Subnet != "172.20.0.0/24" || got.IPAM.Config[0].Gateway != "172.20.0.1" {
		t.Errorf("%+v", got)
	}
	web := got.Containers[hexID("a")]
	if len(got.Containers) != 2 || len(web["EndpointID"]) != 64 {
		t.Errorf("containers: %v", got.Containers)
	}
	delete(web, "EndpointID")
	want := map[string]string{"Name": "web", "MacAddress": "02:42:ac:14:00:02", "IPv4Address": "172.20.0.2/24", "IPv6Address": ""}
	if diff := cmp.Diff(want, web); diff != "" {
		t.Error(diff)
	}
	if s := got.Status.IPAM.Subnets["172.20.0.0/24"]; s.IPsInUse != 5 || s.DynamicIPsAvailable != 251 {
		t.Errorf("status: %+v", s)
	}
	got.Status = nil
	n.get("/v1.51/networks/"+front.ID[:12]+"?verbose=true&scope=local", &got)
	if got.Status != nil {
		t.Error("API 1.51 shows a status")
	}
	n.refused("GET", "/networks/nope", "", 404, "network nope not found")
	n.refused("GET", "/networks/front?scope=swarm", "", 404, "network front not found")
	n.refused("GET", "/networks/front?verbose=perhaps", "", 400, "invalid value for verbose: perhaps")
}

func TestNetworkCreate(t *testing.T) {
	n := newNode(t)
	status, body := n.do("POST", "/v1.44/networks/create", `{"Name":"app_default","CheckDuplicate":true,"Driver":"bridge","Scope":"","EnableIPv6":false,
		"IPAM":{"Driver":"default","Options":null,"Config":[{"Subnet":"10.9.0.0/24","Gateway":"10.9.0.254","IPRange":"10.9.0.128/25","AuxiliaryAddresses":{"printer":"10.9.0.7"}}]},
		"Internal":true,"Attachable":false,"Ingress":false,"ConfigOnly":false,"ConfigFrom":null,"Options":{"com.docker.network.driver.mtu":"1400"},
		"Labels":{"com.docker.compose.project":"app"}}`)
	var created struct{ ID, Warning string }
	if err := json.Unmarshal([]byte(body), &created); err != nil || status != 201 || len(created.ID) != 64 || !strings.Contains(body, `"Warning":""`) {
		t.Fatalf("%d %s", status, body)
	}
	got := n.networks.list[3].Config
	want := network.Config{
		Name: "app_default", Driver: "bridge", Internal: true,
		Subnets: []network.Subnet{{
			Prefix: netip.MustParsePrefix("10.9.0.0/24"), Gateway: netip.MustParseAddr("10.9.0.254"),
			Range: netip.MustParsePrefix("10.9.0.128/25"), Aux: map[string]netip.Addr{"printer": netip.MustParseAddr("10.9.0.7")},
		}},
		Labels:  map[string]string{"com.docker.compose.project": "app"},
		Options: map[string]string{"com.docker.network.driver.mtu": "1400"},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"network create app_default"}, n.happened()); diff != "" {
		t.Error(diff)
	}
	for body, want := range map[string]struct {
		status int
		text   string
	}{
		`{"Name":"app_default"}`:                                        {409, "network with name app_default already exists"},
		`{"Name":""}`:                                                   {400, "invalid name: name is empty"},
		`{"Name":"host"}`:                                               {403, "operation is not permitted on predefined host network"},
		`{"Name":"x","EnableIPv6":true}`:                                {501, "EnableIPv6"},
		`{"Name":"x","EnableIPv4":false}`:                               {501, "EnableIPv4"},
		`{"Name":"x","Attachable":true}`:                                {501, "Attachable"},
		`{"Name":"x","Ingress":true}`:                                   {501, "Ingress"},
		`{"Name":"x","ConfigOnly":true}`:                                {501, "ConfigOnly"},
		`{"Name":"x","ConfigFrom":{"Network":"y"}}`:                     {501, "ConfigFrom"},
		`{"Name":"x","Scope":"swarm"}`:                                  {501, "scope"},
		`{"Name":"x","Driver":"overlay"}`:                               {403, "swarm"},
		`{"Name":"x","Driver":"macvlan"}`:                               {501, "macvlan"},
		`{"Name":"x","Driver":"host"}`:                                  {403, `only one instance of "host" network is allowed`},
		`{"Name":"x","Driver":"weave"}`:                                 {404, `plugin "weave" not found`},
		`{"Name":"x","IPAM":{"Driver":"dhcp"}}`:                         {501, `"dhcp"`},
		`{"Name":"x","IPAM":{"Options":{"foo":"1"}}}`:                   {501, `"foo"`},
		ipam(`"Subnet":"banana"`):                                       {400, "invalid subnet banana: invalid CIDR block notation"},
		ipam(`"Subnet":"10.1.2.3/16"`):                                  {400, "invalid subnet 10.1.2.3/16: it should be 10.1.0.0/16"},
		ipam(`"Subnet":"fd00::/64"`):                                    {501, "IPv6"},
		ipam(`"Gateway":"10.1.0.1"`):                                    {400, "needs a subnet"},
		ipam(`"Subnet":"10.1.0.0/16","Gateway":"10.2.0.1"`):             {400, "invalid gateway 10.2.0.1: parent subnet 10.1.0.0/16 doesn't contain this address"},
		ipam(`"Subnet":"10.1.0.0/16","IPRange":"10.0.0.0/8"`):           {400, "CIDR block is bigger than its parent subnet"},
		ipam(`"Subnet":"10.1.0.0/16","IPRange":"10.2.0.0/24"`):          {400, "doesn't contain ip-range"},
		ipam(`"Subnet":"10.1.0.0/16","AuxiliaryAddresses":{"a":"bad"}`): {400, "invalid auxiliary address a: invalid address"},
		`{"Name":`: {400, "invalid JSON"},
		`[]`:       {400, "invalid JSON"},
	} {
		n.refused("POST", "/networks/create", body, want.status, want.text)
	}
	if status, body := n.do("POST", "/v1.47/networks/create", `{"Name":"old","EnableIPv4":false}`); status != 201 {
		t.Errorf("API 1.47 does not know EnableIPv4: %d %s", status, body)
	}
}

func ipam(pool string) string { return `{"Name":"x","IPAM":{"Config":[{` + pool + `}]}}` }

func TestNetworkRemove(t *testing.T) {
	n := newNode(t)
	front := n.networks.add("front", network.DriverBridge, "172.20.0.0/24")
	n.engine.run(hexID("a"), "web", engine.StatusRunning, "")
	n.networks.endpoints = []network.Endpoint{{Sandbox: hexID("a"), NetworkID: front.ID}}
	n.refused("DELETE", "/networks/bridge", "", 403, "bridge is a pre-defined network and cannot be removed")
	n.refused("DELETE", "/networks/nope", "", 404, "network nope not found")
	n.refused("DELETE", "/networks/front", "", 403, `network front has active endpoints (name:"web" id:"`)
	n.networks.endpoints = nil
	if status, body := n.do("DELETE", "/networks/"+front.ID[:12], ""); status != 204 || body != "" {
		t.Errorf("%d %s", status, body)
	}
	if diff := cmp.Diff([]string{"network destroy front"}, n.happened()); diff != "" {
		t.Error(diff)
	}
}

func TestNetworkConnect(t *testing.T) {
	n := newNode(t)
	front := n.networks.add("front", network.DriverBridge, "172.20.0.0/24")
	n.engine.run(hexID("a"), "web", engine.StatusRunning, "")
	n.engine.run(hexID("b"), "hosted", engine.StatusRunning, "")
	n.engine.sandboxes[1].Config.Network = engine.NetworkHost
	n.engine.run(hexID("c"), "guest", engine.StatusExited, "")
	n.engine.containers[2].Config.Sandbox = hexID("a")

	n.refused("POST", "/networks/front/connect", `{}`, 400, "no container given")
	n.refused("POST", "/networks/front/connect", `{"Container":"nope"}`, 404, "No such container: nope")
	n.refused("POST", "/networks/nope/connect", `{"Container":"web"}`, 404, "network nope not found")
	n.refused("POST", "/networks/host/connect", `{"Container":"web"}`, 400, "cannot be connected to host network")
	n.refused("POST", "/networks/front/connect", `{"Container":"hosted"}`, 400, "sharing network namespace with another container or host")
	n.refused("POST", "/networks/front/connect", `{"Container":"guest"}`, 400, "sharing network namespace with another container or host")
	for endpoint, want := range map[string]struct {
		network string
		status  int
		text    string
	}{
		`{"IPAMConfig":{"IPv4Address":"172.17.0.9"}}`: {"bridge", 400, "user specified IP address is supported on user defined networks only"},
		`{"Aliases":["x"]}`:                           {"bridge", 400, "only supported for user-defined networks"},
		`{"IPAMConfig":{"IPv4Address":"10.0.0.9"}}`:   {"front", 400, "no configured subnet contains IP address 10.0.0.9"},
		`{"IPAMConfig":{"IPv4Address":"banana"}}`:     {"front", 400, "invalid JSON"},
		`{"IPAMConfig":{"IPv6Address":"fd00::1"}}`:    {"front", 501, "IPv6"},
		`{"Links":["db:db"]}`:                         {"front", 501, "links"},
		`{"GwPriority":1}`:                            {"front", 501, "GwPriority"},
		`{"MacAddress":"zz"}`:                         {"front", 400, "invalid JSON"},
	} {
		n.refused("POST", "/networks/"+want.network+"/connect", `{"Container":"web","EndpointConfig":`+endpoint+`}`, want.status, want.text)
	}
	status, body := n.do("POST", "/networks/front/connect", `{"Container":"web","EndpointConfig":{"IPAMConfig":{"IPv4Address":"172.20.0.9"},
		"Aliases":["www","web"],"MacAddress":"02:42:00:00:00:09","DriverOpts":{"k":"v"},"Gateway":"","IPAddress":""}}`)
	if status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	want := engine.EndpointConfig{
		Network: front.ID, Aliases: []string{"www"}, Address: netip.MustParseAddr("172.20.0.9"),
		MAC: "02:42:00:00:00:09", DriverOptions: map[string]string{"k": "v"},
	}
	if diff := cmp.Diff(want, n.engine.connects[0], cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	n.refused("POST", "/networks/front/connect", `{"Container":"web"}`, 403, "container web is already attached to network front")
	if status, body := n.do("POST", "/networks/front/disconnect", `{"Container":"web","Force":true}`); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	n.refused("POST", "/networks/front/disconnect", `{"Container":"web"}`, 403, "container web is not connected to network front")
}

func TestNetworkPrune(t *testing.T) {
	n := newNode(t)
	front := n.networks.add("front", network.DriverBridge, "172.20.0.0/24")
	n.networks.add("back", network.DriverBridge, "172.21.0.0/24")
	n.networks.add("keep", network.DriverBridge, "172.22.0.0/24")
	n.networks.list[5].Config.Labels = map[string]string{"keep": "1"}
	n.networks.list[5].Created = time.Now()
	n.networks.endpoints = []network.Endpoint{{NetworkID: front.ID}}
	prune := func(filters string) string {
		status, body := n.do("POST", "/networks/prune?filters="+urlEscape(filters), "")
		if status != 200 {
			t.Errorf("%d %s", status, body)
		}
		return strings.TrimSpace(body)
	}
	if got := prune(`{"label":["nothing"]}`); got != `{"NetworksDeleted":[]}` {
		t.Error(got)
	}
	if got := prune(`{"label!":["keep=1"]}`); got != `{"NetworksDeleted":["back"]}` {
		t.Error(got)
	}
	if got := prune(`{"until":["1h"]}`); got != `{"NetworksDeleted":[]}` {
		t.Error(got)
	}
	n.refused("POST", "/networks/prune?filters="+urlEscape(`{"name":["x"]}`), "", 400, "invalid filter 'name'")
	n.refused("POST", "/networks/prune?filters="+urlEscape(`{"until":["tomorrow"]}`), "", 400, "invalid time")
}

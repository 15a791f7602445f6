package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	criapi "k8s.io/cri-api/pkg/apis"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"
)

// criTimeout bounds one request to the CRI socket.
const criTimeout = 30 * time.Second

// cmdCRI is a small CRI client, made with the kubelet's own library:
//
//	cri version
//	cri pod NAME                          run a sandbox; prints its ID
//	cri container POD NAME IMAGE ARG...   create and start; prints its ID
//	cri exec CONTAINER ARG...             ExecSync: prints standard output
//	cri stream CONTAINER ARG...           Exec through the streaming server
//	cri forward POD PORT PATH             port-forward; prints what GET PATH answers
//	cri stats CONTAINER                   prints its memory use and limit, in bytes
//	cri pods | cri containers             prints their IDs
//	cri state CONTAINER                   prints its state and exit code
//	cri wait CONTAINER                    the same once it has ended
//	cri ip POD | cri images | cri log POD NAME
//	cri stop POD | cri remove POD
func cmdCRI(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: [!] cri VERB ARG...")
	}
	ctx, cancel := context.WithTimeout(context.Background(), criTimeout)
	defer cancel()
	endpoint := "unix://" + filepath.Join(ts.Getenv("BERTH_ROOT"), "run/cri.sock")
	runtime, err := remote.NewRemoteRuntimeService(ctx, endpoint, criTimeout, nil, true)
	ts.Check(err)
	c := criClient{ctx: ctx, runtime: runtime, logs: filepath.Join(ts.Getenv("BERTH_ROOT"), "pod-logs")}
	out, err := c.do(endpoint, args[0], args[1:])
	switch {
	case err == nil && neg:
		ts.Fatalf("it succeeded: %s", out)
	case err != nil && neg:
		fmt.Fprintln(ts.Stderr(), err)
	case err != nil:
		ts.Fatalf("%v", err)
	default:
		fmt.Fprintln(ts.Stdout(), strings.TrimRight(out, "\n"))
	}
}

type criClient struct {
	ctx     context.Context
	runtime criapi.RuntimeService
	logs    string
}

func (c criClient) do(endpoint, verb string, args []string) (string, error) {
	if need := map[string]int{"pod": 1, "container": 4, "exec": 2, "stream": 2, "forward": 3, "stats": 1, "state": 1, "wait": 1, "ip": 1, "log": 2, "stop": 1, "remove": 1}[verb]; len(args) < need {
		return "", fmt.Errorf("cri %s takes at least %d arguments", verb, need)
	}
	switch verb {
	case "version":
		v, err := c.runtime.Version(c.ctx, "v1")
		if err != nil {
			return "", err
		}
		return v.RuntimeName + " " + v.RuntimeApiVersion, nil
	case "pod":
		return c.runtime.RunPodSandbox(c.ctx, c.podConfig(args[0]), "")
	case "container":
		return c.container(args[0], args[1], args[2], args[3:])
	case "exec":
		stdout, stderr, err := c.runtime.ExecSync(c.ctx, args[0], args[1:], criTimeout)
		if err != nil {
			return "", fmt.Errorf("%w: %s", err, stderr)
		}
		return string(stdout), nil
	case "stream":
		return c.stream(args[0], args[1:])
	case "forward":
		return c.forward(args[0], args[1], args[2])
	case "stats":
		s, err := c.runtime.ContainerStats(c.ctx, args[0])
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%d %d", s.GetMemory().GetUsageBytes().GetValue(), s.GetMemory().GetWorkingSetBytes().GetValue()+s.GetMemory().GetAvailableBytes().GetValue()), nil
	case "pods", "containers":
		return c.list(verb)
	case "state", "wait":
		return c.state(args[0], verb == "wait")
	case "ip":
		s, err := c.runtime.PodSandboxStatus(c.ctx, args[0], false)
		if err != nil {
			return "", err
		}
		return s.Status.Network.GetIp(), nil
	case "log":
		return filepath.Join(c.logs, args[0], args[1]+".log"), nil
	case "stop":
		return "", c.runtime.StopPodSandbox(c.ctx, args[0])
	case "remove":
		return "", c.runtime.RemovePodSandbox(c.ctx, args[0])
	case "images":
		return c.images(endpoint)
	}
	return "", errors.New("unknown verb " + verb)
}

// state polls for the end when it is to wait; the request's deadline bounds that.
func (c criClient) state(container string, wait bool) (string, error) {
	for {
		s, err := c.runtime.ContainerStatus(c.ctx, container, false)
		if err != nil {
			return "", err
		}
		if !wait || s.Status.State == cri.ContainerState_CONTAINER_EXITED {
			return fmt.Sprintf("%s %d", s.Status.State, s.Status.ExitCode), nil
		}
		time.Sleep(pollInterval)
	}
}

func (c criClient) podConfig(name string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name + "-uid", Namespace: "default"},
		Hostname:     name,
		LogDirectory: filepath.Join(c.logs, name),
		Labels:       map[string]string{"app": name},
		Linux:        &cri.LinuxPodSandboxConfig{},
	}
}

// container finds the pod's name by its sandbox, since a creation repeats the pod's config.
func (c criClient) container(pod, name, image string, args []string) (string, error) {
	status, err := c.runtime.PodSandboxStatus(c.ctx, pod, false)
	if err != nil {
		return "", err
	}
	id, err := c.runtime.CreateContainer(c.ctx, pod, &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name},
		Image:    &cri.ImageSpec{Image: image},
		Command:  args,
		LogPath:  name + ".log",
		Linux:    &cri.LinuxContainerConfig{Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}},
	}, c.podConfig(status.Status.Metadata.Name))
	if err != nil {
		return "", err
	}
	return id, c.runtime.StartContainer(c.ctx, id)
}

// stream runs a program through the streaming server, as kubectl exec does.
func (c criClient) stream(container string, args []string) (string, error) {
	answer, err := c.runtime.Exec(c.ctx, &cri.ExecRequest{ContainerId: container, Cmd: args, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		return "", err
	}
	address, err := url.Parse(answer.Url)
	if err != nil {
		return "", err
	}
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{}, "POST", address)
	if err != nil {
		return "", err
	}
	var stdout, stderr strings.Builder
	err = executor.StreamWithContext(c.ctx, remotecommand.StreamOptions{Stdin: strings.NewReader("typed\n"), Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, stderr.String())
	}
	return stdout.String(), nil
}

// forward asks an HTTP server at a pod's loopback address, as kubectl port-forward does.
func (c criClient) forward(pod, port, path string) (string, error) {
	number, err := strconv.ParseInt(port, 10, 32)
	if err != nil {
		return "", err
	}
	answer, err := c.runtime.PortForward(c.ctx, &cri.PortForwardRequest{PodSandboxId: pod, Port: []int32{int32(number)}})
	if err != nil {
		return "", err
	}
	address, err := url.Parse(answer.Url)
	if err != nil {
		return "", err
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		return "", err
	}
	stop, ready, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	forwarder, err := portforward.New(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", address), []string{"0:" + port}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		return "", err
	}
	go func() { ended <- forwarder.ForwardPorts() }()
	defer func() { close(stop); <-ended }()
	select {
	case <-ready:
	case err := <-ended:
		ended <- nil
		return "", fmt.Errorf("port-forward ended: %w", err)
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		return "", err
	}
	request, err := http.NewRequestWithContext(c.ctx, "GET", fmt.Sprintf("http://127.0.0.1:%d%s", ports[0].Local, path), nil)
	if err != nil {
		return "", err
	}
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxBody))
	return string(body), err
}

// list prints a line for each; none when nothing is left.
func (c criClient) list(verb string) (string, error) {
	var ids []string
	if verb == "pods" {
		pods, err := c.runtime.ListPodSandbox(c.ctx, nil)
		if err != nil {
			return "", err
		}
		for _, pod := range pods {
			ids = append(ids, pod.Id)
		}
	} else {
		containers, err := c.runtime.ListContainers(c.ctx, nil)
		if err != nil {
			return "", err
		}
		for _, container := range containers {
			ids = append(ids, container.Id)
		}
	}
	return strings.Join(ids, "\n"), nil
}

func (c criClient) images(endpoint string) (string, error) {
	service, err := remote.NewRemoteImageService(c.ctx, endpoint, criTimeout, nil, true)
	if err != nil {
		return "", err
	}
	list, err := service.ListImages(c.ctx, nil)
	if err != nil {
		return "", err
	}
	var names []string
	for _, image := range list {
		names = append(names, image.RepoTags...)
	}
	return strings.Join(names, "\n"), nil
}

package criapi

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"berth/internal/errdefs"
)

// code is the one place where kinds of errors become gRPC codes. A program that is missing or
// cannot be executed is InvalidArgument, not NotFound: to a kubelet NotFound means that the
// container is gone.
func code(err error) codes.Code {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	for _, k := range []struct {
		kind error
		code codes.Code
	}{
		{errdefs.ErrNotFound, codes.NotFound},
		{errdefs.ErrExists, codes.AlreadyExists},
		{errdefs.ErrInvalid, codes.InvalidArgument},
		{errdefs.ErrInvocation, codes.InvalidArgument},
		{errdefs.ErrNoProgram, codes.InvalidArgument},
		{errdefs.ErrConflict, codes.FailedPrecondition},
		{errdefs.ErrNotModified, codes.FailedPrecondition},
		{errdefs.ErrUnauthorized, codes.Unauthenticated},
		{errdefs.ErrForbidden, codes.PermissionDenied},
		{errdefs.ErrUnsupported, codes.Unimplemented},
		{errdefs.ErrUnavailable, codes.Unavailable},
		{errdefs.ErrExhausted, codes.ResourceExhausted},
		{errdefs.ErrDataLoss, codes.DataLoss},
	} {
		if errors.Is(err, k.kind) {
			return k.code
		}
	}
	return codes.Unknown
}

// toStatus gives err its gRPC form; one that has a form keeps it.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	return status.Error(code(err), err.Error())
}

func unaryErrors(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	resp, err := next(ctx, req)
	return resp, toStatus(err)
}

func streamErrors(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return toStatus(next(srv, s))
}

// gone tells that the object is not there, which stopping and removing take for success.
func gone(err error) bool { return errors.Is(err, errdefs.ErrNotFound) }

// missing is the error for an object that does not exist, or was not made through the CRI.
func missing(what, id string) error {
	return errdefs.New(errdefs.ErrNotFound, "%s %q: not found", what, id)
}

// unsupported refuses a field that is set.
func unsupported(field, why string) error {
	return errdefs.New(errdefs.ErrUnsupported, "%s is not supported: %s", field, why)
}

func invalid(format string, args ...any) error {
	return errdefs.New(errdefs.ErrInvalid, format, args...)
}

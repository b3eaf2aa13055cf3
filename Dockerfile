# Our own image: `operator`, `agent`, and in the pods of models `wait-cap` and `checkpoint`.
FROM python:3.13-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/tokenfactory
# The versions of the lock file, without what only developers need: what pyproject.toml does not ask for is not installed.
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY operator ./operator
RUN sed -E '/^ +--hash/d; s/ *\\$//' requirements.lock > /tmp/constraints.txt \
 && /opt/tokenfactory/bin/pip install --no-cache-dir --disable-pip-version-check -c /tmp/constraints.txt . \
 && /opt/tokenfactory/bin/python -m compileall -q /opt/tokenfactory

FROM python:3.13-slim-bookworm
COPY --from=build /opt/tokenfactory /opt/tokenfactory
ENV PATH=/opt/tokenfactory/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["tokenfactory"]
